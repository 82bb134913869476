"""Prompts read in slices of time: their graphs held at a gate while those that run have steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_tools import (
    LONG,
    OTHERS,
    WAIT,
    answers,
    ask,
    idle,
    intercept,
    running,
    same,
    scheduler,
    submit,
    until,
)
from settings import CACHED

import lvlm
from lvlm.core.errors import BackendError, EngineClosedError, RequestCancelled, RequestTimeout
from lvlm.runtime.backends.ort.kernels.gates import KernelGate
from lvlm.runtime.backends.ort.kernels.kernel_library import KERNELS
from lvlm.runtime.engine import Engine
from lvlm.runtime.engine.chunks import ChunkPace

# Read in pieces, as a whole, and on from compressed entries; with options of the bundle
RECIPES: dict[str, dict[str, Any]] = {
    "none": {},
    "lightvlm (cached)": {},
    "snapkv (cached)": {"sessions": True},
}
ASKS = [
    ask("Read the top row.", (1,)),
    ask("<image> and <image> which is it, and why is it so?", (0, 1), chat_template=False),
    ask("What is in the middle of it?", (0,), max_new_tokens=9, ignore_eos=True),
]


@pytest.fixture(autouse=True)
def _with_kernels(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions have the kernels, at which a graph can be held."""
    monkeypatch.setenv(KERNELS, str(kernels))


@pytest.fixture
def shortest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slice ends at the next kernel."""
    monkeypatch.setattr(ChunkPace, "slice_seconds", lambda *_, **__: 0.0)


def folder_of(recipe: str, bundle: Callable[..., Path]) -> Path:
    options = {"max_images": 2} | RECIPES[recipe]
    return bundle("digits-llava", *CACHED.get(recipe, (recipe,)), **options)


class Counted:
    """A gate that counts how often something was held."""

    def __init__(self, gate: KernelGate) -> None:
        self.within, self.open, self._gate, self.held = gate.within, gate.open, gate, 0

    def shut(self) -> bool:
        waits = self._gate.shut()
        self.held += waits
        return waits


def counted(engine: Engine) -> Counted:
    gate = scheduler(engine).gate
    assert isinstance(gate, KernelGate)
    found = Counted(gate)
    scheduler(engine).gate = found
    return found


@pytest.mark.usefixtures("shortest")
@pytest.mark.parametrize("recipe", RECIPES)
def test_answers_are_those_without_slices(recipe: str, bundle: Callable[..., Path]) -> None:
    folder = folder_of(recipe, bundle)
    with lvlm.load(folder) as model:
        alone = [a.alone(model) for a in (*ASKS, *OTHERS)]
    with Engine(folder, slots=3, image_cache=0) as engine:
        gate = counted(engine)
        running(engine).cancel()  # it knows how long a step takes
        beside = running(engine)
        with answers(engine, OTHERS, alone[len(ASKS) :]):
            handles = [submit(engine, a) for a in ASKS]
            for handle, one in zip(handles, alone, strict=False):
                answer = handle.result(WAIT)
                same(answer, one)
        beside.cancel()
        idle(engine)
    assert gate.held > 0


@pytest.mark.usefixtures("shortest")
def test_the_next_turn_of_a_compressed_conversation(bundle: Callable[..., Path]) -> None:
    folder = folder_of("snapkv (cached)", bundle)
    turn: dict[str, Any] = {"max_new_tokens": 4}

    def talk(engine: Engine) -> list[list[int]]:
        with engine.session() as session:
            first = engine.submit(OTHERS[0].prompt, OTHERS[0].arguments[1], session=session, **turn)
            said = [first.result(WAIT).token_ids]
            again = f"{OTHERS[0].prompt} and once more, slowly"
            second = engine.submit(again, OTHERS[0].arguments[1], session=session, **turn)
            return [*said, second.result(WAIT).token_ids]

    with Engine(folder, slots=3) as engine:
        expected = talk(engine)
        gate, beside = counted(engine), running(engine)
        held = gate.held
        assert talk(engine) == expected
        assert gate.held > held
        beside.cancel()


def reading(engine: Engine) -> tuple[Any, Any]:
    """A request that runs, and one whose prompt is being read and was held at the gate."""
    gate = counted(engine)
    beside = running(engine)
    read = engine.submit(*ASKS[0].arguments, **LONG)
    until(lambda: gate.held > 0)
    return beside, read


@pytest.fixture
def busy(folder: Path, shortest: None) -> Iterator[Engine]:  # noqa: ARG001
    with Engine(folder, slots=2, chunk_tokens=0, image_cache=0) as engine:
        yield engine
        if scheduler(engine)._thread.is_alive():
            idle(engine)
    assert not [t for t in threading.enumerate() if t.name == "lvlm-reading"]


def test_cancelled_between_two_slices(busy: Engine) -> None:
    beside, read = reading(busy)
    read.cancel()
    with pytest.raises(RequestCancelled):
        read.result(WAIT)
    until(lambda: not scheduler(busy).batch.slots.filling)
    told = len(beside.token_ids)
    until(lambda: len(beside.token_ids) > told)
    beside.cancel()


def test_out_of_time_between_two_slices(busy: Engine) -> None:
    beside = running(busy)
    busy._scheduler.pace.slice_seconds = lambda *_, **__: 0.0  # type: ignore[method-assign]
    held = intercept(busy, "prefill")
    held.before = lambda *_: threading.Event().wait(0.3)  # longer than it has
    read = busy.submit(*ASKS[0].arguments, timeout=0.1, **LONG)
    with pytest.raises(RequestTimeout):
        read.result(WAIT)
    beside.cancel()


def test_closed_between_two_slices(busy: Engine) -> None:
    beside, read = reading(busy)
    busy.close()
    for handle in (beside, read):
        with pytest.raises(EngineClosedError):
            handle.result(WAIT)


def test_a_fault_in_a_slice_is_one_requests(busy: Engine) -> None:
    def fail(*_: Any) -> None:
        raise BackendError("no more of it")

    faulty = intercept(busy, "prefill")
    beside = running(busy)
    faulty.after = fail
    with pytest.raises(BackendError, match="no more of it"):
        busy.submit(*ASKS[0].arguments, **LONG).result(WAIT)
    faulty.after = lambda *_: None
    same(submit(busy, ASKS[0]).result(WAIT), busy.generate(*ASKS[0].arguments, **ASKS[0].options))
    beside.cancel()


def test_a_fixed_length_of_chunks_is_kept(folder: Path) -> None:
    with Engine(folder, slots=2, chunk_tokens=16) as engine:
        gate, beside = counted(engine), running(engine)
        submit(engine, ASKS[0]).result(WAIT)
        beside.cancel()
        assert not gate.held


@pytest.mark.usefixtures("shortest")
def test_a_graph_with_few_kernels_is_not_held(folder: Path) -> None:
    with Engine(folder, slots=2, image_cache=0, reuse_prefixes=False) as engine:
        gate, graph = counted(engine), intercept(engine, "extend")
        graph.gated = engine.manifest.text.layers - 1
        beside = running(engine)
        submit(engine, ASKS[0]).result(WAIT)
        beside.cancel()
        assert not engine.reads_in_slices
        assert not gate.held
