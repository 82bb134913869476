"""A plain copy of a checkpoint that is read as something else than its files have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from lvlm.export.checkpoint.checkpoint import DTYPES, Checkpoint
from lvlm.export.checkpoint.hub import SMALL
from lvlm.export.checkpoint.weight_files import INDEX

SHARD = 1 << 28  # bytes of tensors in memory at a time, unless one alone has more


def copied_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of the copy's weights; 0 where the checkpoint itself is plain."""
    if not checkpoint.made:
        return 0
    numbers = (torch.Size(tensor.shape).numel() for tensor in checkpoint.tensors.values())
    return sum(numbers) * dtype.itemsize


def write_plain(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, progress: Callable[[int], None]
) -> Checkpoint:
    """The same model in ``folder`` as transformers saves it, its numbers of ``dtype``.

    Args:
        progress: is told the bytes of each tensor.
    """
    for pattern in SMALL:
        for path in checkpoint.folder.glob(pattern):
            if not path.name.endswith((".index.json", "adapter_config.json")):
                shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    index: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(part, folder / name)
        index.update(dict.fromkeys(part, name))
        part.clear()

    for name, stored in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        tensor = tensor.to(dtype) if stored.dtype in DTYPES else tensor
        part[name] = tensor.contiguous().clone()
        progress(part[name].nbytes)
        if sum(held.nbytes for held in part.values()) > SHARD:
            write()
    if part:
        write()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return Checkpoint(folder, checkpoint.source, None)
