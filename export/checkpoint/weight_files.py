"""Files that hold a checkpoint's weights: those that transformers would read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lvlm.core.errors import CheckpointError
from lvlm.export.families.parts.side_files import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# As torch saves them; read where there is nothing else
OLDER = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file describes it; ``dtype`` as safetensors writes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def weight_files(
    folder: Path, config: Mapping[str, Any], exists: Callable[[str], bool]
) -> list[str]:
    """Names in ``folder``, in the order of reading.

    Args:
        config: config.json, which may name a file of its own choice.
        exists: whether there is a file of that name, here or on the hub.

    Raises CheckpointError.
    """
    named = config.get("transformers_weights")
    names = [WEIGHTS, INDEX, *OLDER] if named is None else [str(named)]
    for name in names:
        if not exists(_inside(folder, name, "config.json")):
            continue
        return _listed(folder, name, exists) if name.endswith(".index.json") else [name]
    raise CheckpointError(
        f"{folder} has no {' or '.join(names[:2])}; save the checkpoint in safetensors format"
    )


def _listed(folder: Path, index: str, exists: Callable[[str], bool]) -> list[str]:
    listed = read_json(folder / index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(x, str) for x in listed.values()):
        raise CheckpointError(f"{folder / index} has no weight_map of files")
    names = sorted(set(listed.values()))
    for name in names:
        if not exists(_inside(folder, name, index)):
            raise CheckpointError(
                f"{folder / name[:200]} is listed in {index} but missing; is the checkpoint "
                "complete?"
            )
    return names


def _inside(folder: Path, name: str, source: str) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise CheckpointError(f"{source} of {folder} names weights outside the folder: {name[:80]}")
    return name
