"""Local files: in allowed folders, whatever links and paths say."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from lvlm.core.errors import ParameterError
from lvlm.runtime.server.media import MediaError, MediaReader, MediaRules, local_files

OUTSIDE = "the file is in no folder that this server reads"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "media"
    (inside / "deep").mkdir(parents=True)
    (inside / "deep/a b#1?.png").write_bytes(b"image")
    (tmp_path / "media-not").mkdir()
    (tmp_path / "media-not/secret.png").write_bytes(b"secret")
    return inside


def read(folder: Path | str, path: object, max_bytes: int = 100) -> bytes:
    reader = MediaReader(MediaRules(allow_paths=[folder], max_bytes=max_bytes))
    return asyncio.run(asyncio.wait_for(reader.read(str(path)), 10))


def refused(folder: Path | str, path: object, says: str, status: int = 400) -> None:
    with pytest.raises(MediaError, match=says) as error:
        read(folder, path)
    assert error.value.status == status


def test_what_is_read(folder: Path) -> None:
    file = folder / "deep/a b#1?.png"
    rest = "deep/a%20b%231%3f.png"
    for path in (file, f"/{file}", str(file).replace("deep", "./deep//"), file.as_uri()):
        assert read(folder, path) == b"image"
    assert read(folder, f"file://localhost{folder}/{rest}") == b"image"
    assert read(folder, f"FILE://{folder}/deep/a b#1?.png") == b"image"
    assert read(f"{folder}/", file) == b"image"
    assert read(folder.parent / "media-not/../media", file) == b"image"


def test_names_that_are_not_utf_8(folder: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    (folder / name).write_bytes(b"image")
    assert read(folder, f"file://{folder}/%ff.png") == b"image"


def test_links(folder: Path, tmp_path: Path) -> None:
    (folder / "within").symlink_to("deep/a b#1?.png")
    (folder / "out").symlink_to(tmp_path / "media-not/secret.png")
    (folder / "up").symlink_to("..")
    (folder / "nowhere").symlink_to(tmp_path / "media-not/nothing")
    (folder / "loop").symlink_to("loop")
    (tmp_path / "media-not/in").symlink_to(folder / "deep/a b#1?.png")
    (tmp_path / "also").symlink_to(folder)
    assert read(folder, folder / "within") == b"image"
    assert read(tmp_path / "also", tmp_path / "also/within") == b"image"
    assert read(tmp_path / "also", folder / "within") == b"image"
    for path in ("out", "up/media-not/secret.png", "nowhere", "up/media-not/nothing"):
        refused(folder, folder / path, OUTSIDE)
    refused(folder, folder / "loop", "cannot be opened")
    refused(folder, tmp_path / "media-not/in", OUTSIDE)  # it would tell that the link is there


def test_nothing_outside_is_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = MediaReader(MediaRules(allow_paths=[folder]))
    monkeypatch.setattr(os.path, "realpath", None)
    monkeypatch.setattr(os, "open", None)
    for path in ("/", "/etc/passwd", f"{folder}-not/secret.png", folder, folder.parent):
        with pytest.raises(MediaError, match=OUTSIDE):
            asyncio.run(reader.read(str(path)))


@pytest.mark.parametrize(
    "path",
    [
        "{0}/../media-not/secret.png",
        "{0}/deep/../../media-not/secret.png",
        "file://{0}/%2e%2e/media-not/secret.png",
        "file://{0}/..%2fmedia-not%2fsecret.png",
        "{0}/deep/a\0.png",
        "file://{0}/a%00.png",
        "{0}/\ud800.png",
    ],
)
def test_ways_out(folder: Path, path: str) -> None:
    refused(folder, path.format(folder), "has '..' in it or is no valid path")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("file:{0}/x", "write file:///FOLDER/FILE"),
        ("file://host{0}/x", "write file:///FOLDER/FILE"),
        ("file://", "write file:///FOLDER/FILE"),
        ("file://{0}/\ud800", "not valid Unicode"),
        ("media/x", "is no URL that can be read"),
        ("~/x", "is no URL that can be read"),
        ("{0}/nothing", "does not exist"),
        ("{0}/nothing/at/all", "does not exist"),
        ("{0}/deep", "not a regular file"),
        ("{0}/deep/a b#1?.png/x", "cannot be opened"),
        ("{0}/" + "a" * 300, "cannot be opened"),
    ],
)
def test_mistakes(folder: Path, path: str, says: str) -> None:
    refused(folder, path.format(folder), says)


def test_what_is_no_regular_file(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    refused(folder, folder / "pipe", "not a regular file")
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(folder)  # a socket's path must be short
        try:
            one.bind("socket")
        finally:
            os.chdir(here)
        refused(folder, folder / "socket", "cannot be opened")


def test_files_are_closed(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    read(folder, folder / "deep/a b#1?.png")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        read(folder, folder / "deep/a b#1?.png")
        refused(folder, folder / "pipe", "not a regular file")
        refused(folder, folder / "deep", "not a regular file")
        refused(folder, folder / "deep/nothing/x", "does not exist")
    assert len(os.listdir("/proc/self/fd")) == before


def test_size(folder: Path) -> None:
    (folder / "fits").write_bytes(bytes(100))
    (folder / "large").write_bytes(bytes(101))
    assert read(folder, folder / "fits") == bytes(100)
    refused(folder, folder / "large", "at most 100 bytes", status=413)


def test_a_file_that_grows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "log").write_bytes(bytes(100))
    fstat = os.fstat

    def then_more(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        (folder / "log").write_bytes(bytes(200))
        return status

    monkeypatch.setattr(os, "fstat", then_more)
    assert read(folder, folder / "log") == bytes(100)


@pytest.mark.parametrize("part", ["deep", "deep/x"])
def test_a_link_that_is_put_there_after_the_check(
    folder: Path, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "deep/x").write_bytes(b"x")
    (tmp_path / "media-not/x").write_bytes(b"secret")
    opened = local_files._opened

    def swapped(root: str, parts: list[str]) -> int:
        (folder / part).rename(tmp_path / "away")
        (folder / part).symlink_to(tmp_path / "media-not" / Path(part).relative_to("deep"))
        return opened(root, parts)

    monkeypatch.setattr(local_files, "_opened", swapped)
    refused(folder, folder / "deep/x", "cannot be opened")


def test_folders_that_are_none(folder: Path) -> None:
    for path in (folder / "nothing", folder / "deep/a b#1?.png", "a\0", 5):
        with pytest.raises(ParameterError, match="give a folder"):
            MediaReader(MediaRules(allow_paths=[path]))  # type: ignore[list-item]
