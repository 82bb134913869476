"""The built wheel in a clean environment: the runtime alone, without torch."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECK = """
import importlib, pkgutil, sys
import lvlm, lvlm.runtime
for module in pkgutil.walk_packages(lvlm.runtime.__path__, "lvlm.runtime."):
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
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)],
        check=True,
    )
    (file,) = folder.glob("*.whl")
    return file


def test_wheel_holds_the_model_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "lvlm/assets/tiny-llava/model.safetensors" in names
    assert "lvlm/assets/samples/digits-1.png" in names
    assert "lvlm/py.typed" in names
    assert not [n for n in names if "tests" in n.split("/")]
    # Every package on disk is listed in pyproject.toml.
    for folder in ("runtime", "export", "calibration"):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"lvlm/{file.relative_to(ROOT).as_posix()}" in names


def test_base_install_is_the_runtime_only(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run(
        [
            *(python, "-m", "pip", "install", "-q", "--disable-pip-version-check"),
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
