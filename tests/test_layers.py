"""Who may import whom (DESIGN), read from the sources and seen in fresh processes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "lvlm": ROOT / "src/lvlm",
    "lvlm.runtime": ROOT / "runtime",
    "lvlm.export": ROOT / "export",
    "lvlm.calibration": ROOT / "calibration",
    "lvlm.bench": ROOT / "calibration/bench",
    "lvlm.plugins_trt": ROOT / "plugins_trt",
}
# The packages of this project that each one may import, besides itself
BELOW = {
    "lvlm.core": set(),
    "lvlm.runtime": {"lvlm.core"},
    "lvlm.export": {"lvlm.core", "lvlm.runtime"},
    "lvlm.calibration": {"lvlm.core", "lvlm.runtime", "lvlm.export", "lvlm.bench"},
    "lvlm.bench": {"lvlm.core", "lvlm.runtime", "lvlm.export"},
    "lvlm.plugins_trt": {"lvlm.core", "lvlm.runtime", "lvlm.export"},
    "lvlm": {"lvlm.core", "lvlm.runtime"},
}
RUNTIME_NEEDS = {"numpy", "PIL", "tokenizers", "jinja2"}
# Of lvlm-serve alone, which asks for them before it imports what is in there
SERVER_NEEDS = {"fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"}
# The files that know Ray, which only its own processes import
RAY_FILES = {f"lvlm.runtime.server.ray.{name}" for name in ("by_image", "deployments", "mistakes")}
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "sklearn")


@cache
def files() -> dict[str, Path]:
    """Every module of the product by its name."""
    found: dict[str, Path] = {}
    for package, folder in sorted(FOLDERS.items(), key=lambda item: len(str(item[1]))):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found = {name: other for name, other in found.items() if other != path}
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module a file imports, at any depth, also for type checking only."""
    return frozenset(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write lvlm.…, not a relative import"
            assert node.module is not None
            yield node.module
            yield from (
                name
                for name in (f"{node.module}.{alias.name}" for alias in node.names)
                if name in files()
            )


def package_of(module: str) -> str:
    """lvlm.runtime of lvlm.runtime.kv.cache; lvlm of what lies directly in it."""
    package = ".".join(module.split(".")[:2])
    return package if package in BELOW else "lvlm"


def room_of(module: str) -> str:
    """lvlm.runtime.kv of lvlm.runtime.kv.cache; a file that is in no room is one of its own, and a
    folder within a room (parts, passes) is that room."""
    return ".".join(module.split(".")[:3])


@cache
def edges() -> dict[str, frozenset[str]]:
    """Module -> modules of the product that it imports."""
    return {name: imports(path) & files().keys() for name, path in files().items()}


def between_rooms() -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {room_of(module): set() for module in files()}
    for module, others in edges().items():
        room = room_of(module)
        # A package's own __init__ is no room of it
        rooms[room] |= {room_of(o) for o in others if not f"{module}.".startswith(f"{o}.")}
        rooms[room] -= {room}
    return rooms


def circle(graph: Mapping[str, set[str] | frozenset[str]]) -> list[str]:
    """Names on a circle, [] if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_go_downward() -> None:
    for name, path in files().items():
        package = package_of(name)
        for module in imports(path):
            top = module.partition(".")[0]
            assert top not in {"runtime", "export", "calibration", "plugins_trt"}, (name, module)
            if top == "lvlm":
                assert package_of(module) in BELOW[package] | {package}, (name, module)


def test_no_room_and_no_module_imports_itself_by_way_of_others() -> None:
    """Nor by an import in a function or for type checking only."""
    assert circle({"a": {"b"}, "b": {"a"}}) == ["a", "b", "a"]
    assert circle(edges()) == []
    assert circle(between_rooms()) == []


def test_runtime_needs_few_packages() -> None:
    """A backend asks for its own package by ``require``, when it is chosen."""
    for name, path in files().items():
        if package_of(name) in ("lvlm.core", "lvlm.runtime"):
            others = {m.partition(".")[0] for m in imports(path)} - set(sys.stdlib_module_names)
            served = SERVER_NEEDS if room_of(name) == "lvlm.runtime.server" else set()
            served = served | {"ray", "click"} if name in RAY_FILES else served
            assert others <= RUNTIME_NEEDS | served | {"lvlm"}, name


def test_the_scan_sees_the_files() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in files().values()}
    expected = {"runtime/model.py", "runtime/backends/cpu.py", "src/lvlm/main.py"}
    assert expected | {"export/exporter.py", "calibration/datasets/digits.py"} <= names
    assert {"numpy", "lvlm.runtime.kv.budgets"} <= imports(ROOT / "runtime/engine/calls.py")
    assert "lvlm.runtime.kv" in between_rooms()["lvlm.runtime.engine"]
    assert "lvlm.bench.case_figures" in files()
    assert "lvlm.calibration.bench.case_figures" not in files()


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_all_of_the_runtime_loads_nothing_heavy() -> None:
    code = f"""
import importlib, pkgutil, sys
import lvlm.runtime
for module in pkgutil.walk_packages(lvlm.runtime.__path__, "lvlm.runtime."):
    if not module.name.startswith("lvlm.runtime.backends.") and module.name not in {RAY_FILES!r}:
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


def test_targets_are_found_with_what_the_extra_build_brings() -> None:
    """On a Jetson, which builds engines from lowered graphs."""
    code = """
import sys
sys.modules |= dict.fromkeys(("onnx_ir", "onnxscript", "torch", "transformers", "onnxruntime"))
from lvlm.core.discovery import discover
print(len(discover("lvlm.export.targets", "TARGET")))
"""
    assert int(python(code)) > 9


def test_tests_of_the_runtime_start_without_torch() -> None:
    """Those that export import it when they do."""
    code = """
import sys, pytest
folders = ["tests/runtime", "tests/core"]
assert pytest.main(["-qqq", "--collect-only", "-p", "no:cacheprovider", *folders]) == 0
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    assert python(code).splitlines()[-1] == "[]"


def test_commands_see_to_signals_before_anything_else_is_imported() -> None:
    """Ctrl-C while these are imported would end in a traceback."""
    code = """
import sys
before = set(sys.modules)
import lvlm.commands
print(sorted({"typing", "re", "argparse", "lvlm.verbs"} & set(sys.modules) - before))"""
    assert python(code).strip() == "[]"


def test_tests_import_public_names_only() -> None:
    private = [
        f"{path.relative_to(ROOT)}: {name.name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lvlm")
        for name in node.names
        if name.name.startswith("_")
    ]
    assert private == []
