"""Weights read where they lie: mapped from their files once, for every session.

Mapped pages come from the disk when they are first read, are shared with other processes, and can
be dropped again at any time.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lvlm.core.errors import BackendError
from lvlm.runtime.bundle.manifest import Weight

SECONDS = 0.004  # between two looks at what has been read
BITS = {"uint4": 4, "int4": 4, "bfloat16": 16}  # of types that numpy has not


class MappedWeights:
    """Bytes of files, as arrays that must not outlive this object's use."""

    def __init__(self) -> None:
        self._files: dict[Path, mmap.mmap] = {}

    def bytes_of(self, folder: Path, name: str, weight: Weight) -> np.ndarray:
        """The bytes [n] uint8 of one weight; BackendError if its shape needs others."""
        path = folder / weight.file
        if path not in self._files:
            with path.open("rb") as file:
                self._files[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        bits = BITS.get(weight.dtype) or 8 * np.dtype(weight.dtype).itemsize
        if weight.bytes != -(-math.prod(weight.dims) * bits // 8):
            raise BackendError(
                f"{path} has no {name} where the manifest says; export the bundle again"
            )
        return np.frombuffer(self._files[path], np.uint8, weight.bytes, weight.offset)

    @contextmanager
    def dropped_when_read(self) -> Iterator[None]:
        """Meanwhile pages go soon after they were read: packing reads every weight once, and the
        file would stay in the process's memory beside the packed weights."""
        done = threading.Event()

        def drop() -> None:
            while not done.wait(SECONDS):
                self._drop()

        thread = threading.Thread(target=drop, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._drop()

    def _drop(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            for mapping in self._files.values():
                mapping.madvise(mmap.MADV_DONTNEED)
