"""Files and their hashes: what is read at each load, and which changes that finds."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from lvlm.core import integrity
from lvlm.core.errors import BundleError
from lvlm.core.integrity import DIGITS, File, FileHash, Verify, check_files, describe, sha256_of

BLOCK = 64
SIZE = 40 * BLOCK + 7  # 41 blocks, the last one short


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "BLOCK", BLOCK)
    monkeypatch.setattr(integrity, "WHOLE", integrity.SAMPLES * BLOCK)


@pytest.fixture(autouse=True)
def stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with stamps of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/lvlm/verified.json"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were hashed as a whole."""
    names: list[str] = []
    monkeypatch.setattr(
        integrity, "sha256_of", lambda path: (names.append(path.name), sha256_of(path))[1]
    )
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "small").write_bytes(b"small")
    (folder / "large").write_bytes(bytes(i // BLOCK for i in range(SIZE)))
    return folder


@pytest.fixture
def files(folder: Path) -> dict[str, File]:
    return {name: describe(folder / name) for name in ("small", "large")}


def flip(path: Path, position: int) -> None:
    """Another byte, at the same size and time."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[position] ^= 255
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def refused(folder: Path, files: dict[str, File], verify: Verify = "sample") -> str:
    with pytest.raises(BundleError) as caught:
        check_files(folder, files, verify)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_hashes_do_not_depend_on_the_pieces(folder: Path, files: dict[str, File]) -> None:
    data = (folder / "large").read_bytes()
    for pieces in (1, 63, 64, 65, 1000, SIZE):
        found = FileHash()
        for start in range(0, SIZE, pieces):
            found.update(data[start : start + pieces])
        found.update(b"")
        assert found.file() == files["large"]
    assert files["large"].sha256 == sha256_of(folder / "large")
    assert len(files["large"].blocks) == 41 * DIGITS
    assert files["small"].blocks == ""


def test_large_files_are_hashed_once_small_ones_always(
    folder: Path, files: dict[str, File], hashed: list[str]
) -> None:
    check_files(folder, files)
    assert hashed == ["small", "large"]
    hashed.clear()
    check_files(folder, files)
    assert hashed == ["small"]
    hashed.clear()
    check_files(folder, files, "none")
    assert hashed == []
    check_files(folder, files, "full")
    assert hashed == ["small", "large"]
    hashed.clear()
    os.utime(folder / "large", ns=(0, 1))  # another time: met for the first time
    check_files(folder, files)
    assert hashed == ["small", "large"]


@pytest.mark.parametrize("position", [0, SIZE - 1])
def test_a_change_that_kept_size_and_time_is_found_at_both_ends(
    folder: Path, files: dict[str, File], position: int
) -> None:
    check_files(folder, files)
    flip(folder / "large", position)
    assert "large has changed since its export" in refused(folder, files)
    check_files(folder, files, "none")


def test_a_change_in_the_middle_is_found_by_chance_or_when_all_is_read(
    folder: Path, files: dict[str, File]
) -> None:
    check_files(folder, files)
    flip(folder / "large", 20 * BLOCK)
    found = 0
    for _ in range(100):
        try:
            check_files(folder, files)
        except BundleError:
            found += 1
    assert 0 < found < 100  # 14 of 39 blocks: 36 expected
    assert "large has changed" in refused(folder, files, "full")


def test_small_files_never_rest_on_a_stamp(folder: Path, files: dict[str, File]) -> None:
    check_files(folder, files)
    flip(folder / "small", 2)
    assert "small has changed" in refused(folder, files)


def test_files_without_hashes_of_blocks_rest_on_their_stamp(
    folder: Path, files: dict[str, File], hashed: list[str]
) -> None:
    """Bundles of schema 3."""
    old = {"large": File(files["large"].sha256, SIZE)}
    check_files(folder, old)
    check_files(folder, old)
    assert hashed == ["large"]
    flip(folder / "large", 0)
    assert "large has changed" in refused(folder, old, "full")


def test_a_stamp_is_for_one_hash(folder: Path, files: dict[str, File]) -> None:
    check_files(folder, files)
    other = {"large": File("0" * 64, SIZE, files["large"].blocks)}
    assert "large has changed" in refused(folder, other)


def test_sizes_are_compared_always(folder: Path, files: dict[str, File]) -> None:
    with (folder / "large").open("ab") as file:
        file.write(b"x")
    assert re.search(r"large has 2,568 bytes, not 2,567", refused(folder, files, "none"))


def test_only_regular_files_are_opened(folder: Path, files: dict[str, File]) -> None:
    """A FIFO without a writer would be waited for without end."""
    (folder / "small").unlink()
    os.mkfifo(folder / "small")
    assert "small is not a file" in refused(folder, files)


def test_a_name_that_no_file_can_have(folder: Path) -> None:
    assert "File name too long" in refused(folder, {"n" * 300: File("", 0)})


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', "[" * 100_000])
def test_a_broken_stamp_file_only_costs_a_hash(
    folder: Path, files: dict[str, File], stamps: Path, content: str
) -> None:
    stamps.parent.mkdir(parents=True)
    stamps.write_text(content)
    check_files(folder, files)
    assert list(json.loads(stamps.read_text())) == [str(folder / "large")]


def test_stamps_of_files_that_are_gone_are_forgotten(
    folder: Path, files: dict[str, File], stamps: Path
) -> None:
    check_files(folder, files)
    check_files(folder.rename(folder.parent / "moved"), files)
    assert all("/moved/" in name for name in json.loads(stamps.read_text()))


def test_no_place_for_stamps(folder: Path, files: dict[str, File], stamps: Path) -> None:
    stamps.parent.parent.write_text("a file where the cache folder should be")
    check_files(folder, files)
    check_files(folder, files)
