"""Full TensorRT, played by TensorRT-RTX: what it builds for, its plugin libraries, its errors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lvlm.core import nvidia
from lvlm.core.errors import BackendError
from lvlm.core.nvidia import Gpu, NvidiaDriver
from lvlm.plugins_trt.engines.tensorrt_builder import BuildSettings, TensorRtBuilder, failure
from lvlm.runtime.bundle.engine_sets import EngineSet
from lvlm.runtime.bundle.reader import read_bundle

rtx = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.usefixtures("in_this_process")
GPU = Gpu("NVIDIA L4", 89, 24 << 30, integrated=False)


def as_tensorrt(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Full TensorRT played by TensorRT-RTX: the same interface, and it builds without a GPU."""

    class Package:
        __version__ = version

        def __getattr__(self, name: str) -> Any:
            return getattr(rtx, name)

    monkeypatch.setitem(sys.modules, "tensorrt", Package())  # type: ignore[arg-type]
    monkeypatch.setattr(nvidia, "driver", lambda: NvidiaDriver((13, 0), (GPU,)))


def test_features_that_are_no_default() -> None:
    """Without the first a plugin that writes the cache is refused, or copies it; without the second
    every call takes the memory of the longest one."""
    tensorrt = TensorRtBuilder("tensorrt-rtx")
    builder = rtx.Builder(tensorrt.log)
    config = tensorrt._config(builder, BuildSettings())
    for name in ("ALIASED_PLUGIN_IO_10_03", "RUNTIME_ACTIVATION_RESIZE_10_10"):
        assert config.get_preview_feature(getattr(rtx.PreviewFeature, name))


def test_what_builders_say_of_memory() -> None:
    """Messages of TensorRT 8 to 11, which needs a GPU to run out of memory."""
    requested = "Requested amount of GPU memory (1099511627776 bytes) could not be allocated."
    assert "1099.5 GB were asked for" in str(failure("TensorRT", requested, None))
    cuda = "Error Code 2: OutOfMemory (Requested size was 2147483648 bytes.)"
    assert "not enough GPU memory" in str(failure("TensorRT", cuda, 1))
    tactic = "Could not find any implementation for node x due to insufficient workspace."
    assert "within --workspace 4.0 GB" in str(failure("TensorRT", tactic, 4 * 10**9))
    assert "not enough GPU memory" in str(failure("TensorRT", tactic, None))
    assert "cannot build this graph: other" in str(failure("TensorRT", "other", 1))


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX")  # its timing cache
def test_full_tensorrt_builds_on_the_gpu_there_is(
    folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    as_tensorrt(monkeypatch, "11.1.0")
    cache = tmp_path / "times.cache"
    argv = (folder, "--target", "trt-11-portable", "--batch", "1", "--weights", "embedded")
    code, out, err = run(*argv, "--timing-cache", cache, "--max-prompt", "60")
    assert code == 0, err
    assert out.startswith(str(folder / "engines" / "l4-tensorrt-11.1.0"))
    assert cache.stat().st_size > 0
    assert not list(tmp_path.glob(".times*"))
    (engines,) = EngineSet.find(folder, "tensorrt")
    assert (engines.gpu, engines.sms, engines.plugins) == ("NVIDIA L4", (89,), None)
    assert not any(graph.weights for graph in engines.graphs.values())
    manifest = read_bundle(folder)
    same = {"gpu_sm": 89, "gpu_name": "NVIDIA L4", "plugin_hash": None, "manifest": manifest}
    engines.check(version="11.1.0", **same)
    with pytest.raises(BackendError, match=r"are of tensorrt 11.1.0, here is 11.2.0; rebuild them"):
        engines.check(version="11.2.0", **same)


def test_targets_for_another_version_or_gpu(
    folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "liblvlm_plugins.so"
    library.touch()
    as_tensorrt(monkeypatch, "10.13.3")
    given = ("--plugins", library)
    err = refused(folder, "--target", "jetson-orin-jp62", *given)
    assert "is for TensorRT 10.3, here is 10.13.3; choose another target" in err
    err = refused(folder, "--target", "jetson-thor-jp7", *given)
    assert "is for Jetson Thor, JetPack 7 (sm_110), this GPU is NVIDIA L4 (sm_89)" in err
    monkeypatch.setattr(nvidia, "driver", lambda: NvidiaDriver((13, 0), ()))
    assert "sees no GPU" in refused(folder, "--target", "jetson-thor-jp7", *given)


class Registry:
    """A plugin registry with a library of only some plugins; ``handle`` None: it cannot be read."""

    def __init__(self, handle: object, has: tuple[str, ...]) -> None:
        self.handle, self.has = handle, has

    def load_library(self, _: str) -> object:
        return self.handle

    def get_creator(self, name: str, version: str, namespace: str) -> object:
        return name if (version, namespace) == ("1", "lvlm") and name in self.has else None


def test_libraries_of_another_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensorrt = TensorRtBuilder("tensorrt-rtx")
    ops = ("CacheCompact", "CacheUpdate", "TokenMerge")
    for handle, has, why in (
        (None, ops, "cannot be loaded as a plugin library"),
        (1, ops[:1], "lacks the plugins CacheUpdate, TokenMerge that the graphs need"),
        (1, ops, None),
    ):
        registry = Registry(handle, has)
        monkeypatch.setattr(rtx, "get_plugin_registry", lambda registry=registry: registry)
        if why is None:
            tensorrt.load_plugins(tmp_path / "x.so", ops)
            continue
        with pytest.raises(BackendError, match=why):
            tensorrt.load_plugins(tmp_path / "x.so", ops)
