"""Resident memory of this process: what it holds at most, asked of the operating system."""

from __future__ import annotations

import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def peak_bytes() -> int | None:
    """Most memory resident since the last ``forget_peak`` (or the start); None: unknown here.

    Pages of mapped files count, as they do for whoever runs out of memory. What a GPU holds does
    not.
    """
    if STATUS.exists():  # ru_maxrss would count what the parent held when it forked
        lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def forget_peak() -> None:
    """Start a new peak at what is resident now; where the system cannot, the old one goes on."""
    try:
        CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return
