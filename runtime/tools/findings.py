"""Findings of the doctor: a line each, and how it looks at the machine."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lvlm.core.errors import BackendError, LvlmError
from lvlm.core.nvidia import NvidiaDriver, driver
from lvlm.runtime.backends.ort.kernels.kernel_library import Found, find_kernels

ABSENT = "–"  # noqa: RUF001 - a dash is meant


@dataclass(frozen=True)
class Finding:
    """subject  what was looked at
    ok       it can be used
    says     what was seen
    fix      how to come by it, or how to mend it
    version  of the package, where it decides what runs
    broken   it is there, and does not work: what is not there may simply not be wanted"""

    subject: str
    ok: bool
    says: str
    fix: str = ""
    version: str = ""
    broken: bool = False

    @property
    def mark(self) -> str:
        return "✓" if self.ok else "✗" if self.broken else ABSENT


@dataclass(frozen=True)
class Machine:
    """Access to the machine; tests put another here."""

    driver: Callable[[], NvidiaDriver] = driver
    version: Callable[[str], str | None] = lambda name: _version(name)
    attempt: Callable[[str], str] = lambda code: _attempt(code)
    load: Callable[[str], Any] = ctypes.CDLL
    jetson: Path = Path("/etc/nv_tegra_release")
    kernels: Callable[[], Found] = find_kernels


def unusable(subject: str, error: LvlmError, fix: str = "") -> Finding:
    """Finding that something is there and does not work."""
    what, _, mend = str(error).partition("; ")
    return Finding(subject, False, what, fix or mend or "see the message", broken=True)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _attempt(code: str) -> str:
    """Text that a fresh Python prints for this code. Raises BackendError with its last line."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        raise BackendError(lines[-1])
    return done.stdout


def as_json(findings: list[Finding]) -> str:
    return json.dumps([vars(finding) for finding in findings], ensure_ascii=False)


def can_run(findings: list[Finding]) -> bool:
    """True where one device at least can be used (for the bundle, if one was looked at), and
    nothing that is there is broken."""
    kind = "bundle on " if any(f.subject == "bundle" for f in findings) else "device "
    usable = any(f.ok and f.subject.startswith(kind) for f in findings)
    return usable and not any(f.broken for f in findings)
