"""Are the files of a bundle the ones that were exported?

Hashing 14 GB at every start would take half a minute, so a stamp outside the bundle remembers files
that were verified, by path, size and modification time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from lvlm.runtime.errors import BundleError


def check_files(
    folder: Path, expected: Mapping[str, tuple[str, int]], *, hashes: bool = True
) -> None:
    """Raise BundleError for a file of ``expected`` (name -> sha256, bytes) missing or changed.

    ``hashes`` False looks at places and sizes only.
    """
    try:
        _check_files(folder, expected, hashes)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise BundleError(f"{folder} cannot be read: {error}") from None


def _check_files(folder: Path, expected: Mapping[str, tuple[str, int]], hashes: bool) -> None:
    stamps = _read_stamps()
    fresh = dict(stamps)
    for name, (sha256, size) in expected.items():
        path = folder / name
        if folder.resolve() not in path.resolve().parents:
            raise BundleError(f"'{name}' in {folder} leads outside it; do not use this bundle")
        if not path.is_file():
            raise BundleError(f"{folder} lacks the file {name}; copy it again or export again")
        status = path.stat()
        if status.st_size != size:
            raise BundleError(
                f"{path} has {status.st_size:,} bytes, not {size:,}; copy it again or export again"
            )
        if not hashes:
            continue
        key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns, sha256]
        if fresh.get(key) == stamp:
            continue
        if sha256_of(path) != sha256:
            raise BundleError(f"{path} has changed since its export; copy it again or export again")
        fresh[key] = stamp
    if fresh != stamps:
        _write_stamps(fresh)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lvlm" / "verified.json"


def _read_stamps() -> dict[str, list[object]]:
    try:
        data = json.loads(_stamp_file().read_text())
    except (OSError, ValueError, RuntimeError):
        return {}  # nothing verified yet, or a stamp cut short, or no home: verify again
    return data if isinstance(data, dict) else {}


def _write_stamps(stamps: dict[str, list[object]]) -> None:
    kept = {k: v for k, v in stamps.items() if os.path.exists(k)}
    try:
        path = _stamp_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(kept))
        partial.replace(path)
    except (OSError, RuntimeError):
        return  # a read-only home costs a hash at every start, nothing more
