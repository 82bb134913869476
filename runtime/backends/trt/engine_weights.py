"""Weights that are inputs of engines: on the device once, whichever engines read them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lvlm.core.errors import BackendError
from lvlm.runtime.backends import host_dtype
from lvlm.runtime.backends.trt.driver import DeviceArray, DeviceBuffer, Driver, PinnedBlock
from lvlm.runtime.backends.trt.staging import aligned
from lvlm.runtime.bundle.engine_sets import EngineWeight

Key = tuple[Path, int, int]  # file, offset, bytes
CHUNK = 32 << 20  # bytes copied at once: enough for full speed


class Weights:
    """Uploads every part of a bundle's files once, the first time that an engine asks for it."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._there: dict[Key, DeviceArray] = {}

    def of(self, bundle: Path, weights: Sequence[EngineWeight]) -> dict[str, DeviceArray]:
        """The weights of one engine, by name."""
        keys = {w.name: (bundle / w.file, w.offset, w.bytes) for w in weights}
        new = {keys[w.name]: w for w in weights if keys[w.name] not in self._there}
        if new:
            self._upload_all(new)
        return {name: self._there[key] for name, key in keys.items()}

    def _upload_all(self, new: Mapping[Key, EngineWeight]) -> None:
        buffer = DeviceBuffer(
            self.driver,
            sum(aligned(w.bytes) for w in new.values()),
            "the model",
            "close what else uses the GPU, or export with a smaller --dtype",
        )
        host = PinnedBlock(self.driver, min(CHUNK, max(w.bytes for w in new.values())))
        offset = 0
        for key, weight in new.items():
            self._upload(key[0], weight, buffer.address + offset, host)
            self._there[key] = DeviceArray(buffer, weight.dims, weight.dtype, offset)
            offset += aligned(weight.bytes)

    def _upload(self, path: Path, weight: EngineWeight, address: int, host: PinnedBlock) -> None:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = weight.offset + weight.bytes
            size = math.prod(weight.dims) * np.dtype(host_dtype(weight.dtype)).itemsize
            if not 0 <= weight.offset < end <= len(data) or weight.bytes != size:
                raise BackendError(
                    f"{path} has no {weight.name} where engine.json says; build the engines again"
                )
            for start in range(weight.offset, end, CHUNK):
                size = min(CHUNK, end - start)
                host.array[:size] = np.frombuffer(data, np.uint8, size, start)
                self.driver.upload(address + start - weight.offset, host.address, size)
                self.driver.synchronize()  # before the next part takes its place
