"""Native code that crashes in a process of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from lvlm.core.errors import BuildError, ParameterError
from lvlm.core.own_process import in_own_process

pytestmark = pytest.mark.unit


def crash(number: int) -> None:
    os.kill(os.getpid(), number)


def refuse(why: str) -> None:
    raise ParameterError(why)


def say(text: str) -> None:
    print(text)


def wait(begun: Path, ended: Path) -> None:
    try:
        begun.touch()
        time.sleep(60)
    finally:
        ended.touch()


def test_what_it_prints_and_its_status(capfd: pytest.CaptureFixture[str]) -> None:
    assert in_own_process("lvlm-x", say, "hello") == 0
    assert in_own_process("lvlm-x", refuse, "no such thing") == 2
    assert capfd.readouterr() == ("hello\n", "lvlm-x: error: no such thing\n")


def test_a_crash_is_an_error() -> None:
    with pytest.raises(BuildError, match=r"signal 11 \(Segmentation fault\) ended it"):
        in_own_process("lvlm-x", crash, signal.SIGSEGV)


def test_what_ends_the_command_ends_its_process(tmp_path: Path) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"

    def interrupt() -> None:
        while not begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    def stop(*_: object) -> None:
        raise SystemExit(1)

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(SystemExit):
            in_own_process("lvlm-x", wait, begun, ended)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ended.exists()  # SIGTERM, on which it clears up
