"""Opening what somebody named: files, and named pipes with and without a writer."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread

import pytest

from lvlm.core.opening import at_once

PATIENCE = 20.0  # seconds, for a reader that hangs


def test_a_file_is_read_as_ever(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"what is in it")
    with open(tmp_path / "file", "rb", opener=at_once) as file:
        assert os.get_blocking(file.fileno())
        assert file.read() == b"what is in it"
    with pytest.raises(FileNotFoundError), open(tmp_path / "none", "rb", opener=at_once):
        pass


def test_a_pipe_without_a_writer_is_empty(tmp_path: Path) -> None:
    """Opened and read at once: an ordinary ``open`` waits until there is a writer."""
    os.mkfifo(tmp_path / "pipe")
    found: list[bytes] = []

    def read() -> None:
        with open(tmp_path / "pipe", "rb", opener=at_once) as pipe:
            found.append(pipe.read())

    reader = Thread(target=read, daemon=True)
    reader.start()
    reader.join(PATIENCE)
    waits = reader.is_alive()
    if waits:
        (tmp_path / "pipe").write_bytes(b"for whom it waits")
    assert not waits
    assert found == [b""]


def test_a_pipe_is_read_as_it_is_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "pipe", "rb", opener=at_once) as pipe:
        assert os.get_blocking(pipe.fileno())
        with open(tmp_path / "pipe", "wb") as writer:
            writer.write(b"one line")
        assert pipe.read() == b"one line"
