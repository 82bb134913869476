"""The machine a run was made on: processor, how busy it is, how fast it reads memory, versions."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lvlm.core.errors import ParameterError
from lvlm.runtime.backends.host.buffers import physical_memory

BUSY = 0.25  # of the cores already taken before the run: figures will be noisy
READ_BYTES = 1 << 30  # well beyond any cache


def cores() -> int:
    """Number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_copies(copies: int, threads: int | None) -> int:
    """Threads of each of ``copies``, which have cores of their own. Raises ParameterError."""
    if copies == 1:
        return threads or cores()
    if not hasattr(os, "sched_setaffinity"):
        raise ParameterError("--copies needs a system where processes are given cores, as Linux")
    threads = threads or max(1, cores() // copies)
    if copies * threads > cores():
        raise ParameterError(
            f"--copies {copies} with {threads} thread{'s' * (threads > 1)} each need "
            f"{copies * threads} cores, this machine has {cores()}; give fewer"
        )
    return threads


def busy() -> str | None:
    """A warning if others use the machine; None if they do not, or it does not tell."""
    try:
        load = os.getloadavg()[0]
    except (OSError, AttributeError):
        return None
    if load < BUSY * cores():
        return None
    return f"the machine is busy (load {load:.1f} on {cores()} cores): figures will be noisy"


def describe(threads: int, packages: Sequence[str]) -> dict[str, Any]:
    """Description of the machine, for every figure; bytes per second are measured here and now."""
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": threads,
        "memory_bytes": physical_memory(),
        "read_bytes_per_s": read_bandwidth(threads),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": versions(packages),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def read_bandwidth(threads: int, size: int = READ_BYTES, repeats: int = 5) -> float:
    """Bytes per second that ``threads`` threads read from memory together: the best of some tries.

    Each takes the maximum of its part of one array, a loop that waits for memory alone.
    """
    import numpy as np

    parts = np.array_split(np.ones(size // 4, np.float32), threads)
    best = float("inf")
    for _ in range(repeats):
        workers = [threading.Thread(target=part.max) for part in parts]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - began)
    return size / best
