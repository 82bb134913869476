"""Seconds from starting lvlm-serve to its being ready: in a fresh container, and again.

    python scripts/measure_start.py tiny/ none/ --starts 5 --threads 1

``first``: the bundle's files are not in memory, and nobody has compared them with their hashes, as
where a new machine gets a replica. ``again``: both, as after a restart. Medians; lowest and highest
in parentheses. The modules of Python are in memory either way.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True)
class StartedServer:
    """``start``: seconds until it was ready."""

    url: str
    pid: int
    start: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print("| bundle | MB | first s | again s |")
    print("| --- | --: | --: | --: |")
    for bundle in args.bundles:
        files = [file for file in bundle.iterdir() if file.is_file()]
        size = sum(file.stat().st_size for file in files) / 1e6
        found: dict[bool, list[float]] = {True: [], False: []}
        with tempfile.TemporaryDirectory() as kept:
            for number in range(-1, args.starts):
                for fresh in (True, False):
                    with tempfile.TemporaryDirectory() as new:
                        if fresh:
                            forget(files)
                        environment = {"XDG_CACHE_HOME": new if fresh else kept}
                        words = ("--threads", str(args.threads))
                        with replica(bundle, words, environment=environment) as server:
                            if number >= 0:
                                found[fresh].append(server.start)
        cells = [
            f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
            for times in found.values()
        ]
        print(f"| {bundle.name} | {size:,.0f} | {' | '.join(cells)} |", flush=True)


def forget(files: Sequence[Path]) -> None:
    """Drop files from the memory that caches the disk."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


@contextmanager
def replica(
    bundle: Path,
    words: Sequence[str],
    *,
    program: Sequence[str] = ("-m", "lvlm", "serve"),
    cores: Sequence[int] | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[StartedServer]:
    """lvlm-serve with further ``words`` in a process of its own, on ``cores`` only."""
    command = [sys.executable, *program, f"model={bundle}", "--port", "0"]
    command += [*words, "--log-level", "error"]
    surroundings = os.environ | (environment or {})
    began = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=surroundings) as process:
        if cores is not None:  # before it has begun any thread
            os.sched_setaffinity(process.pid, cores)
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            found = re.search(r"http://\S+", line)
            if found is None:
                raise SystemExit(f"lvlm-serve did not start: {line}{process.stderr.read()}")
            threading.Thread(target=process.stderr.read, daemon=True).start()
            while not is_ready(found[0]):
                time.sleep(0.02)
            yield StartedServer(found[0], process.pid, time.perf_counter() - began)
        finally:
            process.terminate()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=None).status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
