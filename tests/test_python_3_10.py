"""What runs on a Jetson runs on Python 3.10, which JetPack 6 has: lvlm-run, lvlm-build and
lvlm-doctor; and engines are planned with the extra ``build`` alone."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("runtime", "plugins_trt/engines", "src/lvlm", "export/targets")
LATER = ("runtime/server",)  # lvlm-serve needs 3.11
NEW = {  # with Python 3.11 and later, of modules that we use
    "typing": {"Self", "Unpack", "Never", "assert_never", "assert_type", "reveal_type"}
    | {"NotRequired", "Required", "LiteralString", "TypeVarTuple", "dataclass_transform"}
    | {"override", "TypeAliasType", "get_overloads"},
    "enum": {"StrEnum", "ReprEnum", "verify"},
    "hashlib": {"file_digest"},
    "asyncio": {"timeout", "timeout_at", "TaskGroup", "Runner", "Barrier"},
    "datetime": {"UTC"},
    "contextlib": {"chdir"},
    "itertools": {"batched"},
    "math": {"cbrt", "exp2", "sumprod"},
    "operator": {"call"},
}
MODULES = {"tomllib", "wsgiref.types"}


def files() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return [p for p in found if not str(p.relative_to(ROOT)).startswith(LATER)]


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but annotations, which are never looked at, and what only type checkers read."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            annotation = name in ("annotation", "returns")
            if not isinstance(child, ast.AST) or annotation:
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            yield child
            yield from at_run_time(child)


def later(source: str) -> list[str]:
    """Names of Python 3.11 and later that a file uses when it runs."""
    tree = ast.parse(source, feature_version=(3, 10))
    found = []
    for node in at_run_time(tree):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names} & NEW.get(node.module or "", set())
            found += [f"{node.module}.{name}" for name in sorted(names)]
            found += [node.module] if node.module in MODULES else []
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in MODULES]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            known = node.attr in NEW.get(node.value.id, ())
            found += [f"{node.value.id}.{node.attr}"] if known else []
    return found


def test_nothing_is_of_a_later_python() -> None:
    assert len(files()) > 150
    assert {
        str(p.relative_to(ROOT)): names for p in files() if (names := later(p.read_text()))
    } == {}


def test_a_later_name_is_found() -> None:
    assert later("import asyncio\nasyncio.timeout(1)") == ["asyncio.timeout"]
    assert later("from typing import Any, Self") == ["typing.Self"]
    assert later("if TYPE_CHECKING:\n    from typing import Self\ndef f() -> Self: ...") == []
    with pytest.raises(SyntaxError):
        later("try: ...\nexcept* ValueError: ...")
    assert later("import tomllib") == ["tomllib"]


def python_3_10() -> str | None:
    """The interpreter, of those that version managers keep, too."""
    places = sorted(Path.home().glob(".pyenv/versions/3.10*/bin"))
    path = os.pathsep.join([*map(str, places), os.environ.get("PATH", "")])
    return shutil.which("python3.10", path=path)


PLAN = ("engine", "--target", "jetson-orin-jp62", "--dry-run")


@pytest.mark.parametrize("old", [True, False], ids=["python 3.10", "this python"])
def test_a_plan_with_the_extra_build_alone(
    old: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Neither torch nor onnxruntime nor TensorRT: in an environment of its own."""
    if not request.config.getoption("--whole"):
        pytest.skip("installs packages: --whole")
    python = python_3_10() if old else sys.executable
    if python is None:
        pytest.skip("there is no Python 3.10")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    programs = tmp_path / "venv/bin"
    copy = shutil.copytree(ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(".*", "assets"))
    (copy / "assets").mkdir()
    shutil.copy(ROOT / "assets/__init__.py", copy / "assets")
    where = {**os.environ, "PYTHONPATH": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    install = [programs / "pip", "install", "-q", f"{copy}[build]"]
    if subprocess.run(install, env=where, capture_output=True).returncode:
        pytest.skip("packages cannot be installed here")
    with zipfile.ZipFile(ROOT / "tests/data/bundles/schema-3.zip") as archive:
        archive.extractall(tmp_path)

    def run(name: str, *argv: object) -> subprocess.CompletedProcess[str]:
        words = [str(programs / name), *map(str, argv)]
        return subprocess.run(words, env=where, cwd=tmp_path, capture_output=True, text=True)

    planned = run("lvlm-build", PLAN[0], tmp_path / "s3", *PLAN[1:])
    assert planned.returncode == 0, planned.stderr
    assert "of the GPU's memory when they run" in planned.stdout
    told = run("lvlm-doctor", tmp_path / "s3").stdout
    assert "✓ bundle" in told
    assert run("lvlm-run", "--help").returncode == 0
    exported = run("lvlm-export", "-m", "tiny-llava", "-o", "out")
    assert exported.returncode == 2
    assert exported.stderr.count("\n") == 1
    assert ("needs Python 3.11 or newer" if old else "not installed") in exported.stderr
