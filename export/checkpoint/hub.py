"""Fetching a checkpoint from the Hugging Face hub: the small files first, then the weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvlm.core.errors import CheckpointError, LvlmError
from lvlm.core.progress import Progress, Stage, size
from lvlm.export.checkpoint.adapter import CONFIG as ADAPTER
from lvlm.export.checkpoint.weight_files import Stored, weight_files
from lvlm.export.checkpoint.weight_readers import TORCH
from lvlm.export.families.parts.side_files import read_json

SMALL = ["*.json", "*.jinja", "merges.txt", "tokenizer.model"]
WEIGHTS = ["*.safetensors", "pytorch_model*.bin"]


@dataclass(frozen=True)
class Fetched:
    """A repository's folder in the hub's local cache. ``absent``: weight files that were not
    fetched, by name, with what their headers say; ``absent_bytes`` their size."""

    folder: Path
    absent: dict[str, dict[str, Stored]] = field(default_factory=dict)
    absent_bytes: int = 0


def fetch(hub_id: str, revision: str | None, *, weights: bool, quiet: bool) -> Fetched:
    """Download what the local cache lacks, weights only if they are wanted: of those that are not,
    the headers are read. Raises CheckpointError."""
    with _errors(hub_id, revision):
        sizes = _sizes(hub_id, revision)
        folder = _snapshot(hub_id, revision, SMALL)
        if os.path.isfile(folder / ADAPTER) and not os.path.isfile(folder / "config.json"):
            raise CheckpointError(
                f"{hub_id} is an adapter; download it (hf download) and give its folder with -m"
            )
        config = read_json(folder / "config.json", required=True)

        def exists(name: str) -> bool:
            return name in sizes or os.path.isfile(folder / name)

        names = weight_files(folder, config, exists)
        absent = [name for name in names if not os.path.isfile(folder / name)]
        total = sum(sizes[name] for name in absent)
        if not absent:
            return Fetched(folder)
        if not weights:
            if torch_s := [name for name in absent if name.endswith(TORCH)]:
                raise CheckpointError(
                    f"{hub_id} has {torch_s[0]} instead of safetensors: what is in it is known "
                    f"once it is downloaded ({size(total)}); leave --dry-run out, or give a "
                    "checkpoint in safetensors"
                )
            headers = {name: _header(hub_id, folder, name) for name in absent}
            return Fetched(folder, headers, total)
        free = shutil.disk_usage(folder).free
        if total > free:
            raise CheckpointError(
                f"{hub_id} is {size(total)} to download, the disk of its cache has {size(free)} "
                "free; free some or set HF_HOME to another disk"
            )
        progress = Progress(1, quiet=quiet)
        with progress.stage(f"download {hub_id}, {size(total)}, files: {len(absent)}") as stage:
            _snapshot(hub_id, folder.name, absent, _bar(stage, total))
            stage.result = size(total)
    return Fetched(folder)


def _snapshot(hub_id: str, revision: str | None, files: list[str], bar: Any = None) -> Path:
    from huggingface_hub import snapshot_download

    bar = bar or _silent()
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files, tqdm_class=bar))


def _sizes(hub_id: str, revision: str | None) -> dict[str, int]:
    """Weight files of the repository and their bytes; {} where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        listed = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=WEIGHTS,
            dry_run=True,
            tqdm_class=_silent(),
        )
    except DryRunError:
        return {}
    return {info.filename: info.file_size or 0 for info in listed}


def _header(hub_id: str, folder: Path, name: str) -> dict[str, Stored]:
    from huggingface_hub import parse_safetensors_file_metadata

    found = parse_safetensors_file_metadata(hub_id, name, revision=folder.name)
    return {
        key: Stored(folder / name, tuple(tensor.shape), tensor.dtype)
        for key, tensor in found.tensors.items()
    }


def _silent() -> Any:
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return Silent


def _bar(stage: Stage, total: int) -> Any:
    """A progress bar for the hub's library: bytes go to the stage, nothing is drawn."""

    class Bar(_silent()):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            # Of two bars in bytes one counts what came over the network, one what was written
            written = "Downloading" not in str(options.get("desc"))
            self.counts = options.get("unit") == "B" and written
            super().__init__(*args, **options)

        def update(self, n: float | None = 1) -> None:
            if self.counts:
                stage.add_bytes(int(n or 0), total)

    return Bar


@contextmanager
def _errors(hub_id: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub and the network raise into one line."""
    try:
        yield
    except (LvlmError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(_line(hub_id, revision, error)) from None


def _line(hub_id: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    token = "a token that may read it (hf auth login, or HF_TOKEN)"
    if isinstance(error, GatedRepoError):
        where = f"{constants.ENDPOINT}/{hub_id}"
        return f"{hub_id} is gated: accept its terms at {where}, then give {token}"
    if isinstance(error, RevisionNotFoundError):
        return f"{hub_id} has no revision {str(revision)[:80]}; its page lists branches and tags"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{hub_id} could not be downloaded: the hub has no model of that name that you may "
            f"see; check it, give {token}, or a local folder with -m"
        )
    at = f" at revision {revision[:80]}" if revision is not None else ""
    if constants.HF_HUB_OFFLINE:
        return (
            f"{hub_id}{at} is not in the local cache, and offline mode is on (HF_HUB_OFFLINE); "
            "turn it off once, or give a local folder with -m"
        )
    if isinstance(error, FileNotFoundError):
        reason = f"the hub cannot be reached and the model{at} is not in the local cache"
    else:
        lines = str(error).strip().splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
    return f"{hub_id} could not be downloaded: {reason}; give a local folder with -m"
