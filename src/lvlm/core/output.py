"""Results appear whole or not at all: made beside their place, renamed at the end.

What a process that was killed left there goes with the next one that writes to the same place.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from lvlm.core.errors import LvlmError


def check_place(flag: str, path: Path, error: type[LvlmError]) -> None:
    """Raises ``error`` where nothing can be written beside ``path``, so that it is known before
    any work is done."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise error(f"{flag}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise error(f"{flag}: the folder {folder} cannot be written to; give another one")


@contextlib.contextmanager
def temporary_sibling(output: Path, error: type[LvlmError]) -> Iterator[Path]:
    """A folder beside ``output``; removed unless it was renamed.

    Raises ``error`` for what the file system refuses, also within the body.
    """
    with _partial(output, Path.mkdir, error) as folder:
        yield folder


@contextlib.contextmanager
def whole_file(path: Path, error: type[LvlmError]) -> Iterator[Path]:
    """A path to write to, renamed to ``path`` at the end if nothing was raised.

    Raises ``error`` for what the file system refuses, also within the body.
    """
    with _partial(path, Path.touch, error) as partial:
        yield partial
        partial.replace(path)


@contextlib.contextmanager
def _partial(output: Path, make: Callable[[Path], None], error: type[LvlmError]) -> Iterator[Path]:
    """A place beside ``output`` that this process holds the lock of; what is left there goes."""
    place = _place(output)
    lock = None
    try:
        make(place)
        lock = _lock(place)
        remove_abandoned(output)
        yield place
    except OSError as cause:
        raise error(f"{output} cannot be written: {cause.strerror or cause}") from cause
    finally:
        _remove(place)
        if lock is not None:
            os.close(lock)


def _place(output: Path) -> Path:
    return output.absolute().parent / f".{output.name}.partial-{os.getpid()}"


def remove_abandoned(output: Path) -> None:
    """Leftovers whose process is gone, which is who holds the lock."""
    own = _place(output)
    for old in own.parent.glob(glob.escape(f".{output.name}.partial-") + "*"):
        if old == own or (lock := _lock(old)) is None:
            continue
        _remove(old)
        os.close(lock)


def _remove(path: Path) -> None:
    """A file or a folder with what is in it, as far as it is there and can be removed."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _lock(path: Path) -> int | None:
    """A descriptor that holds a lock on ``path`` until it is closed; None where that is held, or
    the file system has no locks."""
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
