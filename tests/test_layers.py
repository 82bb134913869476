"""Who may import whom (DESIGN), read from the sources and seen in fresh processes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "lvlm": ROOT / "src/lvlm",
    "lvlm.runtime": ROOT / "runtime",
    "lvlm.export": ROOT / "export",
    "lvlm.calibration": ROOT / "calibration",
    "lvlm.plugins_trt": ROOT / "plugins_trt",
}
# The packages of this project that each one may import, besides itself
BELOW = {
    "lvlm": {"lvlm.runtime"},
    "lvlm.runtime": set(),
    "lvlm.export": {"lvlm.runtime"},
    "lvlm.calibration": {"lvlm.runtime", "lvlm.export"},
    "lvlm.plugins_trt": {"lvlm.runtime", "lvlm.export"},
}
RUNTIME_NEEDS = {"numpy", "PIL", "tokenizers", "jinja2"}
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "sklearn")
FILES = [
    (package, path) for package, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))
]


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, at any depth, also for type checking only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write lvlm.…, not a relative import"
            assert node.module is not None
            yield node.module
            if node.module == "lvlm":
                yield from (f"lvlm.{alias.name}" for alias in node.names)


def package_of(module: str) -> str:
    return ".".join(module.split(".")[:2]) if module.startswith("lvlm.") else module


@pytest.mark.parametrize(
    ("package", "path"), FILES, ids=[str(p.relative_to(ROOT)) for _, p in FILES]
)
def test_imports_go_downward(package: str, path: Path) -> None:
    for module in imports(path):
        top = module.partition(".")[0]
        assert top not in {"runtime", "export", "calibration", "plugins_trt"}, module
        if top == "lvlm" and package != "lvlm":
            assert package_of(module) in BELOW[package] | {package}, module
        elif top == "lvlm":
            home = package_of(module)
            assert home not in FOLDERS or home in BELOW["lvlm"] | {"lvlm"}, module


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=str(p.relative_to(ROOT))) for n, p in FILES if n == "lvlm.runtime"],
)
def test_runtime_needs_few_packages(path: Path) -> None:
    """A backend asks for its own package by ``require``, when it is chosen."""
    others = {m.partition(".")[0] for m in imports(path)} - set(sys.stdlib_module_names) - {"lvlm"}
    assert others <= RUNTIME_NEEDS


def test_the_scan_sees_the_files() -> None:
    names = {path.relative_to(ROOT).as_posix() for _, path in FILES}
    expected = {"runtime/model.py", "runtime/backends/cpu.py", "src/lvlm/main.py"}
    assert expected | {"export/exporter.py", "calibration/datasets/digits.py"} <= names
    assert {"numpy", "lvlm.runtime.kv.budgets"} <= set(imports(ROOT / "runtime/generate/batch.py"))


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_all_of_the_runtime_loads_nothing_heavy() -> None:
    code = f"""
import importlib, pkgutil, sys
import lvlm.runtime
for module in pkgutil.walk_packages(lvlm.runtime.__path__, "lvlm.runtime."):
    if not module.name.startswith("lvlm.runtime.backends."):
        importlib.import_module(module.name)
assert "lvlm.runtime.model" in sys.modules
wrong = {{*{HEAVY!r}, "onnxruntime", "lvlm.export", "lvlm.calibration"}}
print(sorted(wrong & set(sys.modules)))
"""
    assert python(code).strip() == "[]"


def test_import_lvlm_is_lazy() -> None:
    code = """
import sys
import lvlm
assert not {"numpy", "PIL", "tokenizers", "jinja2"} & set(sys.modules)
assert not [m for m in sys.modules if m.startswith("lvlm.")]
lvlm.LvlmError
assert "lvlm.runtime.model" not in sys.modules
for name in lvlm.__all__:
    assert getattr(lvlm, name).__name__ == name
try:
    lvlm.nonsense
except AttributeError as error:
    print(error)
"""
    assert "no attribute 'nonsense'" in python(code)


def test_commands_start_without_what_they_run_with() -> None:
    """--help must be quick: argparse comes before numpy."""
    code = """
import sys
import lvlm.main, lvlm.runtime.run_cli, lvlm.export.export_cli
print(sorted({"numpy", "onnxruntime", "PIL", "torch", "onnx", "jinja2"} & set(sys.modules)))
"""
    assert python(code).strip() == "[]"
