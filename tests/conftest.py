"""What all tests share: options, markers, folders of this run, exported bundles, each made once.

Nothing here imports torch, unless a test wants a checkpoint or a bundle: tests of the runtime start
at once.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Without a GPU kernels run in Triton's interpreter, which must be asked for before anything at all
# imports Triton; transformers does.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Small models: more threads only wait for one another. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Functions run unless a test asks for kernels, whatever was built on this machine.
os.environ.setdefault("LVLM_CPU_KERNELS", "off")

import example_counts
from hypothesis import settings
from missing_packages import OptionalModule
from sessions_kept import keep_sessions

from lvlm.runtime.backends import cpu
from lvlm.runtime.backends.ort.shared_sessions import SharedWeights

# Helpers of tests are imported by their names, from tests of any folder
TESTS = Path(__file__).parent
sys.path[:0] = sorted(
    {
        str(file.parent)
        for file in TESTS.rglob("*.py")
        if not file.name.startswith(("test_", "conftest", "__init__"))
        and not (file.parent / "__init__.py").exists()
    }
)

LOADS = SharedWeights.session  # as the product has it

# By default Python's collector goes through all that tests import again and again
gc.set_threshold(100_000, 20, 100)

settings.register_profile("lvlm", deadline=None)  # no test is timed: machines may be busy
settings.load_profile("lvlm")

# Fixtures that export with torch, or build with a compiler: seconds each; ``gpu`` runs kernels,
# which Triton interprets where there is none
SLOW_FIXTURES = {
    *("bundle", "checkpoint", "built", "library", "kernels", "wheel", "tensorrt_headers", "gpu"),
}
PARITY = ("parity", "naive")  # folders


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole", action="store_true", help="every combination of models and recipes, 256 tokens"
    )
    parser.addoption(
        "--stress-steps", type=int, default=90, help="random operations on the engine (90)"
    )
    parser.addoption(
        "--sanitize",
        metavar="WHICH",
        help="compile CPU kernels with these sanitizers and run their tests alone, less those that "
        "export; the sanitizer's library is preloaded (tests/export/ops/test_kernel_builds.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before tests are imported."""
    if config.getoption("--whole"):
        os.environ[example_counts.VARIABLE] = "1"


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return OptionalModule.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Markers: ``parity`` by folder, ``slow`` and ``gpu`` by what a test needs or its own mark,
    ``unit`` on all others."""
    if config.getoption("--sanitize"):
        items[:] = [item for item in items if _needs(item) == {"kernels"}]
    for item in items:
        if any(part in item.path.parts for part in PARITY):
            item.add_marker("parity")
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
        if "gpu" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
        if not {"parity", "slow", "gpu"} & {mark.name for mark in item.iter_markers()}:
            item.add_marker("unit")


def _needs(item: pytest.Item) -> set[str]:
    return {"kernels", "bundle"} & set(getattr(item, "fixturenames", ()))


def pytest_collection_finish() -> None:
    keep_imports()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """What a test was the first to import stays as well."""
    if len(sys.modules) > IMPORTED[0] + 50:
        keep_imports()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # for what libraries look after as they are unloaded


IMPORTED = [0]  # modules that were there when the collector last was told to pass them by


def keep_imports() -> None:
    """Modules stay until the end: the collector, which exports and validation call as well, takes
    half a second and more for them, each time."""
    gc.collect()
    gc.freeze()
    IMPORTED[0] = len(sys.modules)


@pytest.fixture(scope="session")
def stress_steps(pytestconfig: pytest.Config) -> int:
    """How long tests of chance go on."""
    return int(pytestconfig.getoption("--stress-steps"))


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Stamps of verified files go to a folder of this run."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def no_handler_left() -> Iterator[None]:
    """A library that logs may give the root logger a handler of the stderr of that moment, as absl
    does. pytest closes it: what is logged in a later test would fail."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in set(root.handlers) - set(before):
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread_per_session() -> Any:
    """ONNX Runtime, too: test processes share the cores."""
    patch = pytest.MonkeyPatch()
    init = cpu.Backend.__init__
    patch.setattr(cpu.Backend, "__init__", lambda self, threads=None: init(self, threads or 1))
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def sessions_kept() -> Iterator[None]:
    """Graphs that this process has loaded are not loaded again."""
    with pytest.MonkeyPatch.context() as patch:
        keep_sessions(patch)
        yield


@pytest.fixture
def own_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is about loading loads its graphs itself."""
    monkeypatch.setattr(SharedWeights, "session", LOADS)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def checkpoint(shared: Path) -> Callable[[str], Path]:
    """A checkpoint folder by name: digits-llava, a family's tiny configuration or a drawn one, with
    random weights."""
    from exports import make_checkpoint

    return lambda name: make_checkpoint(name, shared)


@pytest.fixture
def shared_traces(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports in this test take graphs that other tests have traced; for those that are about
    something else than tracing."""
    from exports import share_traces

    share_traces(monkeypatch, shared)


@pytest.fixture(scope="session")
def bundle(shared: Path, checkpoint: Callable[[str], Path]) -> Callable[..., Path]:
    """An exported bundle: bundle("digits-llava", "lightvlm", "keep=0.5", dtype="fp16").

    Shared between tests: do not change it, copy it.
    """
    from exports import make_bundle

    def make(model: str, *recipe: str, **options: Any) -> Path:
        return make_bundle(model, checkpoint(model), shared, *recipe, **options)

    return make


@pytest.fixture(scope="session")
def kernels(shared: Path, pytestconfig: pytest.Config) -> Path:
    """The library of CPU kernels, for this CPU's instructions alone."""
    from cpu_kernels import FLAGS, make_kernels

    which = pytestconfig.getoption("--sanitize")
    sanitizer = f" -g -fsanitize={which} -fno-sanitize-recover=all" if which else ""
    return make_kernels(shared / "cpu-kernels", FLAGS + sanitizer)
