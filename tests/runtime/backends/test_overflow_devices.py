"""After an answer that overflowed the next one is what it always was, on every device: wherever the
fault came up, nothing of what it left in the buffers is read again.

Attention gives slots beyond a row's own entries a weight of 0, and 0 times NaN is NaN; so a device
that reads whole buffers shows whatever was left.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_tools import IMAGES, QUESTION, WAIT, idle, intercept, same, scheduler, until
from example_counts import whole
from fake_driver import FakeDriver
from fake_engines import build_engines
from settings import CACHED

import lvlm
from lvlm.core.progress import Progress
from lvlm.export.targets.openvino import TARGET
from lvlm.plugins_trt.engines.lowered_graphs import lower_bundle
from lvlm.runtime.backends.trt.driver import DeviceArray
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.engine import Engine, Handle
from lvlm.runtime.kv.cache import CompactCache
from lvlm.runtime.model import Model
from lvlm.runtime.sampling.sampler import Sampler

DEVICES = ("cpu", "openvino", "cuda", "tensorrt-rtx")
GOOD: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True, "kv_keep": 0.5}
ASK = (QUESTION, IMAGES[:1])
TWO = ([QUESTION, "Read the top row."], [IMAGES[:1], IMAGES[1:]])


@pytest.fixture(scope="module")
def folders(
    bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The bundle as a device takes it; it has a compact graph."""
    source = bundle("digits-llava", *CACHED["lightvlm (cached)"], max_images=2)
    made: dict[str, Path] = {}

    def make(device: str) -> Path:
        if device in ("cpu", "cuda"):
            return source
        if device not in made:
            folder = made[device] = tmp_path_factory.mktemp(device) / "bundle"
            if device == "openvino":
                shutil.copytree(source, folder)
                lower_bundle(folder, read_bundle(folder), TARGET, Progress(1, quiet=True))
            else:
                build_engines(source, folder)
        return made[device]

    return make


@pytest.fixture(params=DEVICES)
def where(request: pytest.FixtureRequest, folders: Callable[[str], Path]) -> tuple[Path, str]:
    """A bundle and the device to load it on, which is there or stood in for."""
    stands_in = {"cuda": "ort", "tensorrt-rtx": "trt"}
    folder = folders(request.param)
    if request.param in stands_in:
        request.getfixturevalue(stands_in[request.param])
    return folder, request.param


class Overflow(Exception):  # noqa: N818
    """What a test raises in the middle of the work."""


def spoil(cache: CompactCache) -> None:
    """Every number of the buffers is NaN."""
    for buffer in cache.buffers.values():
        if isinstance(buffer, np.ndarray):
            buffer[...] = np.nan
        elif isinstance(buffer, DeviceArray):
            driver = cache.backend.driver  # type: ignore[attr-defined]
            assert isinstance(driver, FakeDriver)
            driver.memory(buffer.address, buffer.buffer.nbytes)[:] = 0xFF
        else:
            ctypes.memset(buffer.data_ptr(), 0xFF, buffer.tensor_size_in_bytes())


def nothing(inputs: Any, outputs: Any) -> None:
    """As it was."""


def cache_of(who: Model | Engine) -> CompactCache:
    cache = scheduler(who).batch.slots.cache if isinstance(who, Engine) else who.calls._cache
    assert cache is not None
    return cache


def overflowing_sampler(patch: pytest.MonkeyPatch, who: Model | Engine) -> None:
    """The third token of an answer is not to be had."""
    choose, calls = Sampler.choose, list[int]()

    def third(self: Sampler, logits: np.ndarray) -> int:
        calls.append(1)
        if len(calls) == 3:
            spoil(cache_of(who))
            raise Overflow
        return choose(self, logits)

    patch.setattr(Sampler, "choose", third)


@pytest.mark.parametrize("where", DEVICES if whole() else DEVICES[:1], indirect=True)
def test_a_model_is_clean(where: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, device = where
    with lvlm.load(folder, device=device) as model:
        graphs = {name: intercept(model, name) for name in ("prefill", "decode", "compact")}
        good, two = model.generate(*ASK, **GOOD), model.generate(*TWO, **GOOD)

        def clean() -> None:
            same(model.generate(*ASK, **GOOD), good)

        def fail(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
            spoil(cache_of(model))
            raise Overflow

        def overflow(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
            spoil(cache_of(model))
            outputs["logits"][:] = np.nan

        clean()
        for faulty in graphs.values():
            faulty.after = fail
            with pytest.raises(Overflow):
                model.generate(*ASK, **GOOD)
            faulty.after = nothing
            clean()
        for name in ("prefill", "decode"):
            graphs[name].after = overflow
            with pytest.raises(lvlm.LvlmError, match="NaN"):
                model.generate(*ASK, **GOOD)
            graphs[name].after = nothing
            clean()
        # A logits processor, say
        with monkeypatch.context() as patch:
            overflowing_sampler(patch, model)
            with pytest.raises(Overflow):
                model.generate(*ASK, **GOOD)
        clean()
        # Left by its caller, before anybody looked at the logits
        graphs["decode"].after = overflow
        with model.stream(*ASK, **GOOD) as stream:
            next(stream)
            spoil(cache_of(model))
        graphs["decode"].after = nothing
        clean()
        # A row that has ended is decoded beside the others, and nobody looks at it
        steps = graphs["decode"].calls

        def late(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
            if graphs["decode"].calls == steps + 19:
                spoil(cache_of(model))
                outputs["logits"][0] = np.nan

        graphs["decode"].after = late
        with monkeypatch.context() as patch:
            chosen, choose = list[int](), Sampler.choose

            def ends(self: Sampler, logits: np.ndarray) -> int:
                chosen.append(choose(self, logits))
                return 2 if len(chosen) == 1 else max(3, chosen[-1])

            patch.setattr(Sampler, "choose", ends)
            rows = model.generate(*TWO, **(GOOD | {"ignore_eos": False}))
            assert [len(row.token_ids) for row in rows] == [1, 20]
        graphs["decode"].after = nothing
        for ours, theirs in zip(model.generate(*TWO, **GOOD), two, strict=True):
            same(ours, theirs)


def test_an_engine_is_clean(where: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, device = where
    with Engine(folder, device=device, slots=1) as engine:
        graphs = {name: intercept(engine, name) for name in ("prefill", "decode", "compact")}
        good = engine.generate(*ASK, **GOOD)
        handles: list[Handle] = []

        def clean() -> None:
            same(engine.generate(*ASK, **GOOD), good)
            idle(engine)

        def fail(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
            spoil(cache_of(engine))
            raise Overflow

        def overflow(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
            spoil(cache_of(engine))
            outputs["logits"][:] = np.nan

        def cancel(inputs: Any, outputs: Any) -> None:
            until(lambda: bool(handles))
            overflow(inputs, outputs)
            handles[0].cancel()

        def lost(problem: str) -> None:
            handles[:] = [engine.submit(*ASK, **GOOD)]
            with pytest.raises(lvlm.LvlmError, match=problem):
                handles[0].result(WAIT)

        clean()
        for name, faulty in graphs.items():
            for after, problem in ((fail, "Overflow"), (overflow, "NaN"), (cancel, "cancelled")):
                if name == "compact" and after != fail:
                    continue
                handles.clear()
                faulty.after = after
                lost(problem)
                faulty.after = nothing
                clean()
        with monkeypatch.context() as patch:
            overflowing_sampler(patch, engine)
            lost("Overflow")
        clean()
