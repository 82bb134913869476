"""The built wheel in a clean environment: the runtime alone, without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEW = ("runtime/attic/boxes.py", "export/ops/new_op/contract.py", "export/families/new_family.py")
CHECK = """
import importlib, pkgutil, sys
import lvlm, lvlm.runtime
for module in pkgutil.walk_packages(lvlm.runtime.__path__, "lvlm.runtime."):
    if not module.name.startswith("lvlm.runtime.server."):  # of the extra serve
        importlib.import_module(module.name)
assert lvlm.load
heavy = {"torch", "transformers", "onnx", "onnxruntime", "onnxscript", "tensorrt"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
for name in heavy:
    assert importlib.util.find_spec(name) is None, name
try:
    from lvlm.runtime.backends import open_backend
    open_backend("cpu")
except lvlm.LvlmError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy with a room, an op and a family more, of which nothing else knows."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", ".*")
    shutil.copytree(ROOT, source, ignore=ignored)
    for new in NEW:
        (source / new).parent.mkdir(exist_ok=True)
        (source / new).touch()
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)],
        check=True,
    )
    (file,) = folder.glob("*.whl")
    return file


def test_wheel_holds_the_model_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "lvlm/assets/tiny-llava/model.safetensors" in names
    assert "lvlm/assets/samples/digits-1.png" in names
    assert "lvlm/plugins_trt/library/CMakeLists.txt" in names
    assert "lvlm/plugins_trt/library/test/harness.cpp" in names
    kernels = "lvlm/runtime/backends/ort/kernels/library"
    assert {f"{kernels}/{f}" for f in ("CMakeLists.txt", "op.h", "cache_compact.cpp")} <= {*names}
    assert "lvlm/py.typed" in names
    assert "lvlm/runtime/server/static/index.html" in names
    assert not [n for n in names if "tests" in n.split("/")]


def test_wheel_holds_every_file_there_is(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(set(names)) == len(names)
    files = [*NEW]
    for folder in ("runtime", "export", "calibration", "plugins_trt", "src/lvlm"):
        files += [f.relative_to(ROOT).as_posix() for f in (ROOT / folder).rglob("*.py")]
    for file in files:
        place = file.replace("calibration/bench/", "bench/").removeprefix("src/lvlm/")
        assert f"lvlm/{place}" in names, file
    assert not [n for n in names if n.startswith("lvlm/calibration/bench")]


def test_base_install_is_the_runtime_only(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", python),
            *("install", "-q", "--disable-pip-version-check", "--no-compile"),
            *("-c", ROOT / "constraints.txt", wheel),
        ],
        check=True,
    )
    done = subprocess.run([python, "-c", CHECK], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f'pip install "{wheel}[cpu]"' in done.stdout
    done = subprocess.run(
        [tmp_path / "venv/bin/lvlm-export", "-m", "tiny-llava", "-o", tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert f'pip install "{wheel}[export]"' in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run(
        [tmp_path / "venv/bin/lvlm-serve", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f'pip install "{wheel}[serve]"' in done.stderr
    assert "Traceback" not in done.stderr
