"""Results appear whole or not at all: made in a folder beside their place, renamed at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lvlm.runtime.errors import LvlmError


@contextlib.contextmanager
def temporary_sibling(output: Path, error: type[LvlmError]) -> Iterator[Path]:
    """A folder beside ``output``; removed unless it was renamed. Those of dead processes go too.

    Raises ``error`` for what the file system refuses, also within the body.
    """
    parent, prefix = output.absolute().parent, f".{output.name}.partial-"
    for old in parent.glob(prefix + "*"):
        pid = old.name.removeprefix(prefix)
        if not (pid.isdigit() and Path(f"/proc/{pid}").exists()):
            shutil.rmtree(old, ignore_errors=True)
    folder = parent / f"{prefix}{os.getpid()}"
    try:
        folder.mkdir()
        yield folder
    except OSError as cause:
        raise error(f"{output} cannot be written: {cause.strerror or cause}") from cause
    finally:
        shutil.rmtree(folder, ignore_errors=True)
