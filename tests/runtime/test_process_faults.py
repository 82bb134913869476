"""Signals, full disks and closed outputs: a status that says which, one line at most, nothing left
behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lvlm.core.errors import ExportError
from lvlm.core.output import temporary_sibling, whole_file

PRINT = """
import sys
from lvlm.core.console import run_main
sys.exit(run_main("prog", lambda: print("x") or 0))
"""
WORK = """
import pathlib, sys, time
from lvlm.core.console import run_main
from lvlm.core.errors import ExportError
from lvlm.core.output import temporary_sibling, whole_file

def body():
    place = pathlib.Path(sys.argv[1])
    with temporary_sibling(place / "out", ExportError), whole_file(place / "file", ExportError):
        print("begun", flush=True)
        time.sleep(60)

sys.exit(run_main("prog", body))
"""
# A signal while a module is being imported, whichever it is
INTERRUPT = """
import os, signal, sys
from lvlm import commands

module = sys.argv[1]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.modules.pop(module, None)
sys.argv = ["lvlm-run", "nowhere", "Hi"]
sys.exit(commands.main())
"""

# A signal within a finalizer, which loses every exception
FINALIZER = """
import os, sys, time
from lvlm.core.console import run_main

class Final:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        for _ in range(1000):
            pass

def body():
    final = Final()
    del final
    time.sleep(30)
    return 0

sys.exit(run_main("prog", body))
"""


def python(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], text=True, check=False, timeout=60, **given
    )  # type: ignore[call-overload, no-any-return]


def begun(place: Path) -> subprocess.Popen[str]:
    """A process in the middle of its work."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(place)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_a_closed_pipe_ends_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = python(PRINT, stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_output_is_told_in_a_line() -> None:
    with open("/dev/full", "w") as full:
        done = python(PRINT, stdout=full)
    expected = "prog: error: its output cannot be read or written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, expected)


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_a_full_output_while_the_command_line_is_read(flag: str) -> None:
    code = "import sys\nfrom lvlm.runtime.run_cli import main\nsys.exit(main(sys.argv[1:]))"
    with open("/dev/full", "w") as full:
        done = python(code, flag, stdout=full)
    expected = "lvlm-run: error: its output cannot be read or written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, expected)


def test_nobody_to_tell_is_still_a_status() -> None:
    # Whatever the tests are run with, as users run it: with buffers
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        assert python(PRINT, stdout=full, stderr=full, env=plain).returncode == 2


def test_a_closed_output_is_told_in_a_line() -> None:
    code = f"import subprocess, sys\nsys.stdout = None\n{PRINT}"
    done = python(code)
    assert done.returncode == 2
    assert done.stderr.startswith("prog: error: standard output is closed; ")


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_what_was_begun_is_undone(tmp_path: Path, sent: signal.Signals, status: int) -> None:
    process = begun(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (status, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_within_a_finalizer_is_not_lost(sent: signal.Signals, status: int) -> None:
    done = python(FINALIZER, str(int(sent)))
    assert (done.returncode, done.stderr) == (status, "")


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    killed, alive = begun(tmp_path), begun(tmp_path)
    killed.kill()
    killed.communicate()
    try:
        assert len(list(tmp_path.iterdir())) == 4
        with (
            temporary_sibling(tmp_path / "out", ExportError),
            whole_file(tmp_path / "file", ExportError),
        ):
            left = {path.name.rpartition("-")[2] for path in tmp_path.iterdir()}
        assert left == {str(alive.pid), str(os.getpid())}
    finally:
        alive.kill()
        alive.communicate()


@pytest.mark.parametrize("module", ["lvlm.main", "argparse", "lvlm.runtime.run_cli"])
def test_ctrl_c_while_a_command_is_imported(module: str) -> None:
    done = python(INTERRUPT, module)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_refused_file_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a read-only disk even the removal of what is not there fails."""

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", refuse)
        patch.setattr(Path, "unlink", refuse)
        with (
            pytest.raises(ExportError, match=r"file cannot be written: Read-only file system$"),
            whole_file(tmp_path / "file", ExportError),
        ):
            raise AssertionError("there is no place to write to")
    with pytest.raises(ExportError, match=r"file cannot be written: No space left on device$"):
        _write_half(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def _write_half(path: Path) -> None:
    with whole_file(path, ExportError) as partial:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
