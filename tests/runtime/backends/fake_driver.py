"""A GPU that is not there: host memory under addresses of its own.

What differs on a GPU is kept: nothing in the stream happens before somebody waits for it, copies
take pinned memory only, and an address that is not the device's is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lvlm.core.errors import BackendError
from lvlm.core.nvidia import Gpu

FIRST_ADDRESS = 1 << 52  # no pointer of a process is as large


class FakeDriver:
    """See Driver. ``events`` tells what went into the stream, ``room`` is its memory in bytes."""

    def __init__(self, room: int = 1 << 40, name: str = "Fake RTX", sm: int = 89) -> None:
        self.device = Gpu(name, sm, room, False)
        self.stream = 7
        self.room = room
        self.blocks: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.events: list[tuple[Any, ...]] = []
        self.capture_fails = False
        self._queue: list[Callable[[], None]] = []
        self._recording: list[Callable[[], None]] | None = None
        self._next = FIRST_ADDRESS

    def free_memory(self) -> int:
        return self.room - sum(block.nbytes for block in self.blocks.values())

    def allocate(self, size: int) -> int | None:
        assert self._recording is None, "allocates while a graph is captured"
        if size > self.free_memory():
            return None
        address, self._next = self._next, self._next + -(-size // 256) * 256 + 256
        self.blocks[address] = np.full(size, 0xA5, np.uint8)  # nobody may count on zeros
        return address

    def free(self, address: int) -> None:
        self._flush()
        del self.blocks[address]

    def allocate_pinned(self, size: int) -> int:
        block = np.full(size, 0x5A, np.uint8)
        self.pinned[block.ctypes.data] = block
        return int(block.ctypes.data)

    def free_pinned(self, address: int) -> None:
        self._flush()
        del self.pinned[address]

    def upload(self, device: int, host: int, size: int) -> None:
        source, target = self._at(self.pinned, host, size), self.memory(device, size)
        self.put(lambda: np.copyto(target, source), "upload", size)

    def copy(self, target: int, source: int, size: int) -> None:
        into, old = self.memory(target, size), self.memory(source, size)
        self.put(lambda: np.copyto(into, old), "copy", size)

    def download(self, host: int, device: int, size: int) -> None:
        source, target = self.memory(device, size), self._at(self.pinned, host, size)
        self.put(lambda: np.copyto(target, source), "download", size)

    def clear(self, device: int, size: int) -> None:
        target = self.memory(device, size)
        self.put(lambda: target.fill(0), "clear", size)

    def synchronize(self) -> None:
        self.events.append(("wait",))
        self._flush()

    def capture(self, enqueue: Callable[[], None]) -> int:
        self._recording = []
        try:
            enqueue()
            if self.capture_fails:
                raise BackendError("CUDA failed (cudaErrorStreamCaptureUnsupported)")
            handle = 1 + len(self.graphs)
            self.graphs[handle] = self._recording
        finally:
            self._recording = None
        self.events.append(("capture", handle))
        return handle

    def launch(self, graph: int) -> None:
        self.events.append(("launch", graph))
        self._queue += self.graphs[graph]

    def free_graph(self, graph: int) -> None:
        self._flush()
        self.graphs[graph] = []

    def put(self, work: Callable[[], None], *event: Any) -> None:
        """Into the stream, or into the graph that is captured."""
        if self._recording is None:
            self.events.append(event)
            self._queue.append(work)
        else:
            self._recording.append(work)

    def memory(self, address: int, size: int) -> np.ndarray:
        """``size`` bytes of the device's; what is no address of it, or not any more, fails."""
        return self._at(self.blocks, address, size)

    def kinds(self) -> list[str]:
        return [event[0] for event in self.events]

    def _flush(self) -> None:
        work, self._queue = self._queue, []
        for step in work:
            step()

    @staticmethod
    def _at(blocks: dict[int, np.ndarray], address: int, size: int) -> np.ndarray:
        for start, block in blocks.items():
            if start <= address and address + size <= start + block.nbytes:
                return block[address - start : address - start + size]
        raise AssertionError(f"{address:#x} with {size} bytes is not the memory it should be")
