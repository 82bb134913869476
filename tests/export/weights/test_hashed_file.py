"""A weights file that is written and hashed beside the making of what comes next."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lvlm.core.integrity import BLOCK, WHOLE, describe
from lvlm.export.weights.hashed_file import HashedFile


def test_file_has_every_piece_and_the_hashes_of_its_content(tmp_path: Path) -> None:
    """Pieces that end within a hashed block, and more than is hashed as a whole only."""
    pieces = [os.urandom(n) for n in (5, 0, BLOCK - 1, 3 * BLOCK + 7, WHOLE)]
    with HashedFile(tmp_path / "weights") as file:
        for piece in pieces:
            file.write(memoryview(piece))
        found = file.hashed()
    assert (tmp_path / "weights").read_bytes() == b"".join(pieces)
    assert found == describe(tmp_path / "weights")
    assert file.bytes == found.bytes
    assert found.blocks


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_full_disk_is_told_with_the_next_piece_or_at_the_end() -> None:
    with HashedFile(Path("/dev/full")) as file:
        file.write(bytes(1 << 20))  # more than the file object holds back
        with pytest.raises(OSError, match="No space left"):
            file.hashed()


def test_after_the_end_nothing_is_taken(tmp_path: Path) -> None:
    """Also where what was to come next could not be made."""
    with HashedFile(tmp_path / "weights") as file:
        file.write(bytes(WHOLE))
    assert (tmp_path / "weights").stat().st_size == WHOLE
    with pytest.raises(RuntimeError):
        file.write(b"more")
