"""The library of kernels: where it is looked for, and whether it will do here."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lvlm.core.errors import BackendError

KERNELS = "LVLM_CPU_KERNELS"  # environment variable: the library, or OFF
OFF = "off"
BUILD = "lvlm-build cpu"  # the command that makes it
SOURCES = Path(__file__).parent / "library"
ENDINGS = {"darwin": "dylib", "win32": "dll"}
LIBRARY = f"liblvlm_kernels.{ENDINGS.get(sys.platform, 'so')}"

notes = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """Outcome of the search: a library to use and the CPU's ``instructions`` that its kernels will
    use, or ``why`` there is none and what would ``mend`` that. ``unfit``: one is there."""

    path: Path | None
    instructions: str = ""
    why: str = ""
    mend: str = ""
    unfit: bool = False


def kernel_library() -> Path | None:
    """The library to load into sessions; None: functions run. Says so in one line where there is
    one that this CPU cannot run. Raises BackendError for one that LVLM_CPU_KERNELS names and that
    cannot be loaded."""
    found = find_kernels()
    if found.unfit:
        _say_once(f"{found.why}; {found.mend}")
    return found.path


def find_kernels() -> Found:
    """Looks where LVLM_CPU_KERNELS says, or where ``lvlm-build cpu`` puts it."""
    named = os.environ.get(KERNELS, "")
    if named.lower() == OFF:
        return Found(None, why=f"switched off by {KERNELS}", mend=f"unset {KERNELS}")
    path = Path(named) if named else default_folder() / LIBRARY
    if not named and not path.is_file():
        return Found(None, why="not built", mend=f"{BUILD}; without them it runs as well, slower")
    return _tried(path.absolute())


def default_folder() -> Path:
    """Folder into which ``lvlm-build cpu`` puts it: one for each state of the sources, so that no
    older library is loaded after an upgrade."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lvlm" / "cpu-kernels" / _sources_digest()


@cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for file in sorted(SOURCES.iterdir()):
        if file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _tried(path: Path) -> Found:
    mend = f"build it again ({BUILD}), or set {KERNELS}={OFF}"
    try:
        library = ctypes.CDLL(str(path))
        instructions = library.lvlm_instructions
    except OSError as error:
        raise BackendError(f"the CPU kernels cannot be loaded ({error}); {mend}") from None
    except AttributeError:
        raise BackendError(f"{path} is no library of CPU kernels; {mend}") from None
    instructions.restype = ctypes.c_char_p
    name = instructions()
    if name is None:
        why = "this CPU has neither AVX2 nor NEON, which the CPU kernels need"
        return Found(None, why=why, mend="standard operators run in their place", unfit=True)
    return Found(path, name.decode())


@cache
def _say_once(line: str) -> None:
    notes.warning("lvlm: %s", line)
