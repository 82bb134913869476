"""Runs cases in forked processes of a warm one: what a case breaks, the next does not see.

A process takes cases one after the other until one ends or hangs it; both are outcomes.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from campaign.case import Base, Case, Generator, random_of
from campaign.judge import SECONDS, Outcome, faults

GRACE = 15  # seconds more for making the input, and for cores that others use
ROOM = 8 << 30  # address space that a process may add to what it was forked with
KEPT = 100_000  # characters of output


@dataclass(frozen=True)
class Result:
    generator: str
    number: int
    case: str
    faults: tuple[str, ...]
    status: int
    message: str
    seconds: float
    peak: int


def run(
    name: str, generator: Generator, numbers: Sequence[int], seed: int, base: Base, work: Path
) -> Iterator[Result]:
    """The results of the cases with these numbers, in their order.

    One that hangs is run a second time, and that counts: cores that others use can stop anything
    for a while, an input that hangs does so again.
    """
    left, again = list(numbers), set[int]()
    while left:
        reader, writer = os.pipe()
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            os.close(reader)
            _child(name, generator, left, seed, base, work, writer)
        os.close(writer)
        try:
            for result in _results(reader, process, name, work):
                if "hang" in result.faults and result.number not in again:
                    again.add(result.number)
                    break
                left.remove(result.number)
                yield result
        finally:
            os.close(reader)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, 0)


def _results(reader: int, process: int, name: str, work: Path) -> Iterator[Result]:
    pending, text, began = None, b"", time.monotonic()
    while True:
        ready, _, _ = select.select([reader], [], [], SECONDS + GRACE)
        data = os.read(reader, 1 << 16) if ready else b""
        text += data
        *lines, text = text.split(b"\n")
        for line in lines:
            found = json.loads(line)
            if isinstance(found, dict):
                pending = None
                yield Result(**{**found, "faults": tuple(found["faults"])})
            else:
                pending, began = found, time.monotonic()
        if data:
            continue
        if pending is not None:
            seconds = time.monotonic() - began
            fault, status = "hang", -9
            if ready:
                _, ended = os.waitpid(process, 0)
                status = os.waitstatus_to_exitcode(ended)
                fault = f"ended by signal {-status}" if status < 0 else f"ended with {status}"
            said = _read(work / f"{name}-{pending}" / "stderr")
            described = _read(work / f"{name}-{pending}" / "case.txt")
            yield Result(name, pending, described, (fault,), status, said, seconds, 0)
        return


def _child(
    name: str,
    generator: Generator,
    numbers: Sequence[int],
    seed: int,
    base: Base,
    work: Path,
    writer: int,
) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        for number in numbers:
            os.write(writer, b"%d\n" % number)
            folder = work / f"{name}-{number}"
            result = _one(name, generator, number, seed, base, folder)
            os.write(writer, json.dumps(vars(result)).encode() + b"\n")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _one(
    name: str, generator: Generator, number: int, seed: int, base: Base, folder: Path
) -> Result:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "out").mkdir(parents=True)
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    case = generator.make(random_of(seed, name, number), folder, base)
    (folder / "case.txt").write_text(str(case)[:100_000], errors="backslashreplace")
    outcome = perform(case, folder)
    found = faults(case, outcome, folder)
    os.chdir("/")
    if not found:
        shutil.rmtree(folder, ignore_errors=True)
    return Result(
        name,
        number,
        str(case)[:300],
        tuple(found),
        outcome.status,
        outcome.stderr[-1000:],
        outcome.seconds,
        outcome.peak,
    )


def perform(case: Case, folder: Path) -> Outcome:
    """Runs it here, both streams to files."""
    own = os.dup(1), os.dup(2)
    streams = sys.stdout, sys.stderr
    paths = folder / "stdout", folder / "stderr"
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    began = time.monotonic()
    for number, path in zip((1, 2), paths, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    open_streams()
    try:
        status = _status(case)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = streams
        for number, saved in zip((1, 2), own, strict=True):
            os.dup2(saved, number)
            os.close(saved)
    seconds = time.monotonic() - began
    return Outcome(status, _read(paths[0]), _read(paths[1]), seconds, _peak())


def open_streams() -> None:
    """What Python prints to: the files that are 1 and 2 now."""
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, errors="backslashreplace")


def _status(case: Case) -> int:
    try:
        return case.run()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        raise
    except BaseException:
        traceback.print_exc()
        return 1


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text if len(text) <= KEPT else text[: KEPT // 2] + text[-KEPT // 2 :]
