"""Staging of what changes at each call: pinned host memory, and as much of the device's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lvlm.core.errors import BackendError
from lvlm.runtime.backends.trt.driver import DeviceBuffer, Driver, PinnedBlock
from lvlm.runtime.bundle.engine_sets import ALIGNMENT


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Slot:
    """Room for one array; ``offset`` is in bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Staging:
    """Inputs lie side by side, and so do outputs: one copy takes all of them across.

    The memory stays where it is until a call needs more, so that a captured graph finds it.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.slots: dict[str, Slot] = {}
        self.host: PinnedBlock | None = None
        self.device: DeviceBuffer | None = None
        self.inputs = self.outputs = (0, 0)  # where they begin and end

    def lay_out(
        self,
        inputs: Mapping[str, tuple[tuple[int, ...], str]],
        outputs: Mapping[str, tuple[tuple[int, ...], str]],
        idle: Mapping[str, tuple[tuple[int, ...], str]],
    ) -> None:
        """Room for arrays of these shapes and numpy types; nobody fetches the ``idle`` outputs."""
        self.slots = {}
        end = self._place(0, inputs)
        self.inputs = (0, end)
        start, end = end, self._place(end, outputs)
        self.outputs = (start, end)
        total = self._place(end, idle)
        if self.host is None or self.host.array.nbytes < end:
            self.host = None  # freed before the new one is allocated
            self.host = PinnedBlock(self.driver, end)
        if self.device is None or self.device.nbytes < total:
            self.device = None
            self.device = DeviceBuffer(
                self.driver,
                total,
                "what goes in and out of one call",
                "give fewer prompts or images at once",
            )

    def _place(self, start: int, arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> int:
        for name, (shape, dtype) in arrays.items():
            slot = self.slots[name] = Slot(start, shape, np.dtype(dtype))
            start += aligned(slot.nbytes)
        return start

    @property
    def addresses(self) -> tuple[int, int]:
        """Addresses where the host's memory and the device's begin."""
        return (
            0 if self.host is None else self.host.address,
            0 if self.device is None else self.device.address,
        )

    def address(self, name: str) -> int:
        """The device's copy."""
        assert self.device is not None
        return self.device.address + self.slots[name].offset

    def view(self, name: str) -> np.ndarray:
        """The host's copy; not to be kept."""
        assert self.host is not None
        slot = self.slots[name]
        bytes_ = self.host.array[slot.offset : slot.offset + slot.nbytes]
        return np.ndarray(slot.shape, slot.dtype, bytes_)

    def upload(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Put ``arrays`` into the stream; they may change as soon as this returns."""
        assert self.host is not None
        assert self.device is not None
        for name, array in arrays.items():
            view = self.view(name)
            if array.dtype != view.dtype:
                raise BackendError(f"{name} is {array.dtype}, the graph takes {view.dtype}")
            view[...] = array
        start, end = self.inputs
        if end > start:
            self.driver.upload(self.device.address + start, self.host.address + start, end - start)

    def download(self) -> None:
        """Fetch the outputs; ``view`` has them once the stream is through."""
        assert self.host is not None
        assert self.device is not None
        start, end = self.outputs
        if end > start:
            self.driver.download(
                self.host.address + start, self.device.address + start, end - start
            )
