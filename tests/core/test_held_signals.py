"""Signals while native code runs."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator

import pytest

from lvlm.core.held_signals import held_signals

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """As at a terminal: a shell's background jobs ignore SIGINT. What a signal raises must not end
    in a callback of the collector's, as hypothesis has one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()
    yield
    gc.enable()
    signal.signal(signal.SIGINT, before)


def test_a_signal_acts_at_the_end() -> None:
    done = []

    def work() -> None:
        with held_signals() as came:
            signal.raise_signal(signal.SIGINT)
            done.extend(came)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # as before


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_signals() as came:
        signal.raise_signal(signal.SIGINT)
    assert came == []


def test_other_threads_hold_nothing() -> None:
    found: list[list[int]] = []

    def work() -> None:
        with held_signals() as came:
            found.append(came)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[]]
