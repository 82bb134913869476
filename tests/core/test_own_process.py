"""Native code that crashes in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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
        begun.write_text(str(os.getpgrp()))
        time.sleep(60)
    except BaseException as error:
        ended.write_text("Ctrl-C" if isinstance(error, KeyboardInterrupt) else "SIGTERM")
        raise


def test_what_it_prints_and_its_status(capfd: pytest.CaptureFixture[str]) -> None:
    assert in_own_process("lvlm-x", say, "hello") == 0
    assert in_own_process("lvlm-x", refuse, "no such thing") == 2
    assert capfd.readouterr() == ("hello\n", "lvlm-x: error: no such thing\n")


def test_a_crash_is_an_error() -> None:
    with pytest.raises(BuildError, match=r"signal 11 \(Segmentation fault\) ended it"):
        in_own_process("lvlm-x", crash, signal.SIGSEGV)


@pytest.mark.parametrize(
    ("number", "inside"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGUSR1, "SIGTERM")]
)
def test_what_ends_the_command_ends_its_process(number: int, inside: str, tmp_path: Path) -> None:
    """Ctrl-C goes on to it, once: it is not in the group that a terminal sends to."""
    begun, ended = tmp_path / "begun", tmp_path / "ended"

    def interrupt() -> None:
        until(begun)
        os.kill(os.getpid(), number)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(1)

    before = signal.signal(number, stop)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            in_own_process("lvlm-x", wait, begun, ended)
    finally:
        signal.signal(number, before)
    assert ended.read_text() == inside
    assert int(begun.read_text()) != os.getpgrp()


def test_it_does_not_outlive_the_command(tmp_path: Path) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    code = f"""
from pathlib import Path
from lvlm.core.own_process import in_own_process
from test_own_process import wait
if __name__ == "__main__":
    in_own_process("lvlm-x", wait, Path({str(begun)!r}), Path({str(ended)!r}))
"""
    script = tmp_path / "command.py"
    script.write_text(code)
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = subprocess.Popen(
        [sys.executable, script], env=os.environ | {"PYTHONPATH": here}, stderr=subprocess.DEVNULL
    )
    until(begun)
    command.kill()
    command.wait()
    until(ended)
    assert ended.read_text() == "SIGTERM"


def until(file: Path) -> None:
    """Wait for a file with something in it."""
    end = time.monotonic() + 20
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end, f"no {file.name}"
        time.sleep(0.01)
