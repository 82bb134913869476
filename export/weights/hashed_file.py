"""A file that is hashed and written on a thread of its own, while the next bytes are made."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from lvlm.core.integrity import File, FileHash


class HashedFile:
    """A file to be written from its beginning on, and its hashes.

    Piece by piece: while one is being hashed and written the caller makes the next, so that two
    pieces are in memory at most. Use as a context manager: at its end all is written.

    Attributes:
        bytes: how many have been given so far.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._file, self._hash, self.bytes = path.open("wb"), FileHash(), 0
        self._thread = ThreadPoolExecutor(1, "lvlm-weights")
        self._pending: Future[None] | None = None

    def write(self, piece: bytes | memoryview) -> None:
        """Hand over a piece, which nobody may change after that.

        Raises OSError: of a piece before, too.
        """
        self._finish()
        self.bytes += memoryview(piece).nbytes
        self._pending = self._thread.submit(self._take, piece)

    def hashed(self) -> File:
        """Hashes and size of what was given. Nothing can be added after it. Raises OSError."""
        self._finish()
        return self._hash.file()

    def _take(self, piece: bytes | memoryview) -> None:
        self._file.write(piece)
        self._hash.update(piece)

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self._file.close()
