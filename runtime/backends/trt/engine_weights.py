"""Weights that are inputs of engines: on the device once, whichever engines read them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lvlm.core.errors import BackendError
from lvlm.runtime.backends.trt.driver import DeviceArray, DeviceBuffer, Driver, PinnedBlock
from lvlm.runtime.backends.trt.staging import aligned
from lvlm.runtime.bundle.engine_sets import EngineWeight

Key = tuple[Path, int, int, tuple[int, ...] | None]  # file, offset, bytes, columns
CHUNK = 32 << 20  # bytes copied at once: enough for full speed


class Weights:
    """Uploads every part of a bundle's files once, the first time that an engine asks for it."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._there: dict[Key, DeviceArray] = {}

    def of(self, bundle: Path, weights: Sequence[EngineWeight]) -> dict[str, DeviceArray]:
        """The weights of one engine, by name."""
        keys = {w.name: (bundle / w.file, w.offset, w.bytes, w.columns) for w in weights}
        new = {keys[w.name]: w for w in weights if keys[w.name] not in self._there}
        if new:
            self._upload_all(new)
        return {name: self._there[key] for name, key in keys.items()}

    def _upload_all(self, new: Mapping[Key, EngineWeight]) -> None:
        buffer = DeviceBuffer(
            self.driver,
            sum(aligned(w.nbytes) for w in new.values()),
            "the model",
            "close what else uses the GPU, or export with a smaller --dtype",
        )
        host = PinnedBlock(self.driver, max(_room(w) for w in new.values()))
        offset = 0
        # Parts of one weight one after the other, while its pages are there
        for (path, start, size), parts in groupby(new.items(), key=lambda item: item[0][:3]):
            with path.open("rb") as file:
                for key, weight in parts:
                    self._upload(path, file, weight, buffer.address + offset, host)
                    self._there[key] = DeviceArray(buffer, weight.dims, weight.dtype, offset)
                    offset += aligned(weight.nbytes)
                _drop_pages(file, start, size)

    def _upload(
        self, path: Path, file: BinaryIO, weight: EngineWeight, address: int, host: PinnedBlock
    ) -> None:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if not _lies_there(weight, len(data)):
                raise BackendError(
                    f"{path} has no {weight.name} where engine.json says; build the engines again"
                )
            for start, count, width in _pieces(weight, host.array.nbytes):
                step = weight.bytes // weight.dims[0] if weight.columns else width
                size = count * width
                rows = np.ndarray((count, width), np.uint8, data, start, (step, 1))
                host.array[:size].reshape(count, width)[...] = rows
                del rows  # a view would keep the file from being closed
                self.driver.upload(address, host.address, size)
                self.driver.synchronize()  # before the next part takes its place
                address += size


def _lies_there(weight: EngineWeight, length: int) -> bool:
    """True where a file of ``length`` bytes has what is said of a weight."""
    start, end = weight.offset, weight.offset + weight.bytes
    if not 0 <= start < end <= length or min(weight.dims, default=1) < 1:
        return False
    if weight.columns is None:
        return weight.nbytes == weight.bytes
    if len(weight.dims) != 2 or len(weight.columns) != 2 or weight.bytes % weight.dims[0]:
        return False
    rows, width = weight.dims
    first, stop = weight.columns
    item = weight.nbytes // (rows * width)
    return item > 0 and stop - first == width and first >= 0 and stop * item * rows <= weight.bytes


def _room(weight: EngineWeight) -> int:
    """Bytes of the largest piece of a weight."""
    row = weight.nbytes // weight.dims[0] if weight.columns and weight.dims[0] else 0
    return max(min(CHUNK, weight.nbytes), row)


def _pieces(weight: EngineWeight, max_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Pieces of a weight: the offset of each in the file, how many rows it has, of how many bytes,
    that make no more than ``max_bytes`` together."""
    if weight.columns is None:
        for done in range(0, weight.bytes, max_bytes):
            yield weight.offset + done, 1, min(max_bytes, weight.bytes - done)
        return
    rows, width = weight.dims[0], weight.nbytes // weight.dims[0]
    step, first = weight.bytes // rows, weight.columns[0] * (width // weight.dims[1])
    count = max(1, max_bytes // width)
    for row in range(0, rows, count):
        yield weight.offset + row * step + first, min(count, rows - row), width


def _drop_pages(file: BinaryIO, start: int, size: int) -> None:
    """Give back the memory that holds what was read: where CPU and GPU share theirs, it would be
    there twice."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)
