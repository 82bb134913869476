"""Check that the files of a bundle are the ones that were exported.

A large file is hashed as a whole the first time it is met; a stamp outside the bundle remembers
that, by path, size and modification time. From then on some of its blocks are read at each load,
the first, the last and others by chance: that costs milliseconds, where hashing 14 GB would take
half a minute. Small files are hashed at each load.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from lvlm.core.errors import BundleError, ParameterError, shown

Verify = Literal["sample", "full", "none"]
BLOCK = 1 << 20
SAMPLES = 16  # blocks of a large file that a load reads
WHOLE = SAMPLES * BLOCK  # files up to this size are hashed as a whole
DIGITS = 16  # of a block's hash: against decay, where the whole file's is against malice


@dataclass(frozen=True)
class File:
    """``blocks``: the first 16 hexadecimal digits of the sha256 of each MiB, one after the other;
    empty for files that are hashed as a whole."""

    sha256: str
    bytes: int
    blocks: str = ""


class FileHash:
    """Becomes the ``File`` of what is written or read, piece by piece."""

    def __init__(self) -> None:
        self._whole, self._block, self._bytes = hashlib.sha256(), hashlib.sha256(), 0
        self._blocks: list[str] = []

    def update(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        data = data.cast("B") if data.nbytes else memoryview(b"")
        while len(data):
            piece = data[: BLOCK - self._bytes % BLOCK]
            self._whole.update(piece)
            self._block.update(piece)  # while the processor's cache still has it
            self._bytes += len(piece)
            data = data[len(piece) :]
            if self._bytes % BLOCK == 0:
                self._end_block()

    def file(self) -> File:
        """Nothing can be added after it."""
        if self._bytes % BLOCK:
            self._end_block()
        blocks = "".join(self._blocks) if self._bytes > WHOLE else ""
        return File(self._whole.hexdigest(), self._bytes, blocks)

    def _end_block(self) -> None:
        self._blocks.append(_short(self._block))
        self._block = hashlib.sha256()


def describe(path: Path) -> File:
    """Hashes and size of a file."""
    found = FileHash()
    with path.open("rb") as file:
        while data := file.read(BLOCK):
            found.update(data)
    return found.file()


def sha256_of(path: Path) -> str:
    found, buffer = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            found.update(memoryview(buffer)[:read])
    return found.hexdigest()


def check_files(folder: Path, expected: Mapping[str, File], verify: Verify = "sample") -> None:
    """Raise BundleError for a file of ``expected`` that is missing or has changed, ParameterError
    for another ``verify``.

    Files may be links to anywhere: their hashes protect what is read.

    verify  sample: as this module's first lines say; full: all files are hashed as a whole; none:
            only their sizes are looked at
    """
    if verify not in get_args(Verify):
        raise ParameterError(f"verify is {shown(verify)}; give {', '.join(get_args(Verify))}")
    stamps = {} if verify == "none" else _read_stamps()
    before = dict(stamps)
    for name, file in expected.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not name or set(name) & {"\\", "\0"}:
            raise BundleError(f"the path {shown(name)} leaves {folder}; do not use it")
        try:
            _check_file(folder, name, file, verify, stamps)
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, Python 3.12
            reason = error.strerror if isinstance(error, OSError) else error
            raise BundleError(
                f"{shown(name)} in {folder} cannot be read ({reason}); copy or export it again"
            ) from None
    if stamps != before:
        _write_stamps(stamps)


def _check_file(
    folder: Path, name: str, file: File, verify: Verify, stamps: dict[str, list[Any]]
) -> None:
    path = folder / name
    if not path.is_file():  # nor through links
        there = path.exists()
        what = f"{path} is not a file" if there else f"{folder} lacks the file {name}"
        raise BundleError(f"{what}; copy it again or export again")
    status = path.stat()
    if status.st_size != file.bytes:
        raise BundleError(
            f"{path} has {status.st_size:,} bytes, not {file.bytes:,}; copy it again or export "
            "again"
        )
    if verify == "none":
        return
    key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns, file.sha256]
    if verify == "sample" and file.bytes > WHOLE and stamps.get(key) == stamp:
        same = _sampled(path, file)
    else:
        same = sha256_of(path) == file.sha256
    if not same:
        raise BundleError(f"{path} has changed since its export; copy it again or export again")
    if file.bytes > WHOLE:
        stamps[key] = stamp


def _sampled(path: Path, file: File) -> bool:
    """True where some blocks are as they were; bundles of earlier versions list none."""
    last = len(file.blocks) // DIGITS - 1
    chosen = {0, last, *random.Random().sample(range(1, last), SAMPLES - 2)} if last > 0 else ()
    with path.open("rb") as data:
        for block in sorted(chosen):
            data.seek(block * BLOCK)
            found = _short(hashlib.sha256(data.read(BLOCK)))
            if found != file.blocks[block * DIGITS : (block + 1) * DIGITS]:
                return False
    return True


def _short(digest: Any) -> str:
    return str(digest.hexdigest()[:DIGITS])


def _stamp_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lvlm" / "verified.json"


def _read_stamps() -> dict[str, list[Any]]:
    try:
        data = json.loads(_stamp_file().read_text())
    except (OSError, ValueError, RuntimeError, RecursionError):
        return {}  # nothing verified yet, or a stamp cut short, or no home: verify again
    return data if isinstance(data, dict) else {}


def _write_stamps(stamps: Mapping[str, list[Any]]) -> None:
    kept = {k: v for k, v in stamps.items() if os.path.exists(k)}
    try:
        path = _stamp_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(kept))
        partial.replace(path)
    except (OSError, RuntimeError):
        return  # a read-only home costs a hash at every start, nothing more
