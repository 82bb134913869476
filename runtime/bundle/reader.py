"""Reader of bundles: a folder with graphs, weights, tokenizer and the manifest ``lvlm.json``.

Nothing in a bundle is trusted: every field has its type checked, every file is listed and has its
recorded hash.
"""

from __future__ import annotations

import os
from pathlib import Path

from lvlm.core.errors import BundleError, ParameterError, shown
from lvlm.core.integrity import Verify, check_files
from lvlm.core.typed_json import decode, read_json
from lvlm.runtime.bundle.manifest import MANIFEST, SCHEMA, Manifest
from lvlm.runtime.bundle.manifest_checks import check
from lvlm.runtime.bundle.old_schemas import OLD, upgraded

READABLE = (*OLD, SCHEMA)


def bundle_path(bundle: object) -> Path:
    """The path of a bundle, as a caller gives it. Raises ParameterError if that is no path."""
    try:
        return Path(bundle)  # type: ignore[arg-type]
    except TypeError:
        raise ParameterError(
            f"bundle is {shown(bundle)}; give the path of a folder made by lvlm-export"
        ) from None


def _no_bundle(folder: Path) -> str:
    """Message that says what is there instead, and what to do."""
    name = str(folder) if str(folder).isprintable() else shown(str(folder))
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return f"{name} is a checkpoint; make a bundle of it: lvlm-export -m {name} -o BUNDLE"
        return f"{name} is not a bundle (no lvlm.json in it); make one with lvlm-export -m MODEL"
    if folder.name == MANIFEST and folder.exists():
        return f"{name} is a file of a bundle; give its folder {folder.parent}"
    if os.path.lexists(folder):
        return f"{name} is not a bundle (a file, and a bundle is a folder that lvlm-export made)"
    return f"{name} does not exist; make one with lvlm-export -m MODEL -o {name}"


def read_bundle(folder: str | Path, verify: Verify = "sample") -> Manifest:
    """The checked manifest of a bundle; BundleError says what is wrong with it.

    ``verify``: how the listed files are compared with their hashes (integrity.py); that they are
    there and of the right size is always looked at.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        there = path.is_file()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{shown(str(folder))} cannot be read ({reason})") from None
    if not there:
        raise BundleError(_no_bundle(folder))
    data = read_json(path)
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, bool) or schema not in READABLE:
        raise BundleError(
            f"{path} has schema {shown(schema)}, this version reads {READABLE[0]} to {SCHEMA}; "
            "export again with this version or install the one that wrote it"
        )
    data = upgraded(data, path.name)
    manifest = decode(Manifest, data, path.name)
    check(manifest, path)
    check_files(folder, manifest.files, verify)
    return manifest
