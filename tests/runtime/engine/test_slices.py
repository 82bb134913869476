"""Work in slices of time, the gates that hold it, and how long a slice is."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_tools import WAIT

import lvlm
from lvlm.core.errors import BackendError
from lvlm.runtime.backends.cpu import Backend
from lvlm.runtime.backends.ort.kernels import gates
from lvlm.runtime.backends.ort.kernels.gates import KernelGate
from lvlm.runtime.backends.ort.kernels.kernel_library import KERNELS
from lvlm.runtime.engine.chunks import (
    CHUNK_STEPS,
    HELD_STEPS,
    QUEUE_STEPS,
    STEPS_BETWEEN,
    ChunkPace,
)
from lvlm.runtime.engine.slices import Slices
from lvlm.runtime.model import Model


def test_a_slice_takes_as_long_as_some_steps() -> None:
    pace = ChunkPace(None)
    assert not pace.measured
    pace.stepped(0.02)
    assert pace.slice_seconds(16, queue=False) == pytest.approx(CHUNK_STEPS * 0.02)
    # Short for many streams, as long as alone for one
    few, several, many = (pace.slice_seconds(n, queue=True) for n in (1, 6, 64))
    assert few == pytest.approx(CHUNK_STEPS * 0.02)
    assert several == pytest.approx(HELD_STEPS / 6 * 0.02)
    assert many == pytest.approx(QUEUE_STEPS * 0.02)
    assert pace.steps_after(CHUNK_STEPS * 0.02) == STEPS_BETWEEN
    assert pace.steps_after(CHUNK_STEPS * 0.02, queue=True) == 1
    assert pace.steps_after(QUEUE_STEPS * 0.02) == 1
    fixed = ChunkPace(16)
    fixed.stepped(0.02)
    assert not fixed.measured


class SlowGate:
    """A gate of Python, and work that comes to it again and again."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._waits = threading.Event()
        self.inside = False

    def within(self) -> Any:
        return self

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *_: object) -> None:
        self.inside = False
        self._waits.set()

    def open(self) -> None:
        self._waits.clear()
        self._open.set()

    def shut(self) -> bool:
        self._open.clear()
        assert self._waits.wait(WAIT)
        return self.inside

    def come(self) -> None:
        if not self._open.is_set():
            self._waits.set()
            assert self._open.wait(WAIT)


def test_work_goes_on_in_its_slices_alone() -> None:
    gate, steps, other = SlowGate(), list[str](), threading.Event()

    def work() -> str:
        for _ in range(3):
            other.wait(0.01)
            steps.append("work")
            gate.come()
        return "done"

    slices = Slices(work, gate)
    while not slices.go_on(0.0):
        before = len(steps)
        steps.append("other")
        assert len(steps) == before + 1
    assert slices.result() == "done"
    assert [s for s in steps if s == "work"] == ["work"] * 3
    assert "other" in steps
    assert slices.seconds >= 0.03


def test_what_it_raises_is_the_results() -> None:
    def work() -> None:
        raise BackendError("not today")

    slices = Slices(work, SlowGate())
    assert slices.go_on(None)
    with pytest.raises(BackendError, match="not today"):
        slices.result()


def test_given_up_it_runs_to_its_end(kernels: Path) -> None:
    gate = KernelGate(kernels)
    went = threading.Event()
    slices = Slices(lambda: went.wait(WAIT), gate)
    threading.Timer(0.05, went.set).start()
    slices.release()
    assert slices.go_on(0.0) or slices.go_on(None)
    assert slices.result()


def test_kernels_without_gates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates.ctypes, "CDLL", lambda _: SimpleNamespace())
    with pytest.raises(BackendError, match=r"older than this lvlm; build them again \(lvlm-build"):
        KernelGate(Path("old.so"))


def test_without_kernels_nothing_can_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS, "off")
    assert Backend().gate() is None


def test_what_is_within_waits_and_others_do_not(
    kernels: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KERNELS, str(kernels))
    with lvlm.load(folder) as model, lvlm.load(folder) as other:
        gate = KernelGate(kernels)
        expected = model.generate("Hi", max_new_tokens=3, ignore_eos=True).token_ids
        began, ended, answers = threading.Event(), threading.Event(), list[list[int]]()

        def ask(model: Model) -> None:
            answers.append(model.generate("Hi", max_new_tokens=3, ignore_eos=True).token_ids)

        def within() -> None:
            with gate.within():
                began.set()
                ask(model)
            ended.set()

        gate.shut()  # nobody is within
        thread = threading.Thread(target=within, daemon=True)
        thread.start()
        assert began.wait(WAIT)
        gate.shut()  # returns when it waits
        ask(other)  # on this thread, which is not within
        assert not ended.is_set()
        gate.open()
        thread.join(WAIT)
        assert ended.is_set()
        assert answers == [expected] * 2


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_how_many_nodes_of_a_graph_can_be_held(
    name: str, kernels: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KERNELS, str(kernels))
    with lvlm.load(folder) as model:
        assert model.graphs.gated(name)
        model.graphs.sessions[name].gated = model.manifest.text.layers - 1  # type: ignore[attr-defined]
        assert not model.graphs.gated(name)
    monkeypatch.setenv(KERNELS, "off")
    with lvlm.load(folder) as model:
        assert not model.graphs.gated(name)


FORKS = """
import os, sys, threading, time
from pathlib import Path
from lvlm.runtime.backends.ort.kernels.gates import KernelGate

gate, inside = KernelGate(Path(sys.argv[1])), threading.Event()

def within():
    with gate.within():
        inside.set()
        threading.Event().wait()

for target in (within, gate.shut):  # the second waits for the first
    threading.Thread(target=target, daemon=True).start()
    inside.wait()
time.sleep(0.2)
child = os.fork()
if not child:
    sys.exit(0)
os._exit(os.waitpid(child, 0)[1])
"""


def test_a_forked_child_ends_though_somebody_waits_at_a_gate(kernels: Path) -> None:
    argv = [sys.executable, "-c", FORKS, str(kernels)]
    assert subprocess.run(argv, timeout=WAIT, check=False).returncode == 0
