"""LoRA: the weights that an adapter changes, merged when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lvlm.core.errors import CheckpointError
from lvlm.export.checkpoint.adapter import CONFIG, Adapter, Change, read_adapter
from lvlm.export.checkpoint.checkpoint import DTYPES, Checkpoint
from lvlm.export.checkpoint.checkpoint_form import DenseTensor, Form, MadeTensor, Read
from lvlm.export.checkpoint.weight_readers import open_weights
from lvlm.export.weights.weight_names import renamed


def with_adapter(
    checkpoint: Checkpoint, model: Any, stored_names: Mapping[str, str], *, dense: bool = True
) -> Checkpoint:
    """The checkpoint with its adapter, if it has one, merged.

    Args:
        model: of the checkpoint, on whatever device.
        stored_names: parameter -> name of its tensor in the checkpoint.
        dense: quantized weights are made dense.

    Raises CheckpointError.
    """
    if checkpoint.adapter is None:
        return checkpoint
    adapter = read_adapter(checkpoint.adapter)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    made: dict[str, MadeTensor] = {}
    for key, name in renamed(model, adapter.changes).items():
        change = adapter.changes[key]
        if name is None or name not in shapes:
            raise CheckpointError(
                f"{adapter.folder} changes {key[:200]}, which {checkpoint.source} lacks; is that "
                "its base model?"
            )
        _check_alone(model, name, adapter)
        stored = stored_names[name]
        if not dense and stored in checkpoint.packed:
            raise CheckpointError(
                f"{adapter.folder} changes {key[:200]}, which is quantized; give --dequantize"
            )
        made[stored] = _merged(adapter, key, change, stored, shapes[name])
    ranks = sorted({adapter.tensors[c.down].shape[0] for c in adapter.changes.values() if c.down})
    file = next(iter(adapter.tensors.values())).file
    kind = "DoRA" if adapter.config.get("use_dora") else "LoRA"
    of_ranks = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
    words = f"{kind}{of_ranks} from {adapter.folder.absolute().name} ({len(made)} weights)"
    form = Form(words, made, parts=(adapter.folder / CONFIG, file))
    return replace(checkpoint, forms=(*checkpoint.forms, form))


def _check_alone(model: Any, name: str, adapter: Adapter) -> None:
    """CheckpointError where the parameter is another one's, too: which of them is meant, the base
    model's configuration cannot say."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    others = [n for n, p in parameters.items() if p is parameters[name] and n != name]
    if others:
        raise CheckpointError(
            f"{adapter.folder} changes {name}, which is tied to {others[0]}; merge it with peft "
            "(merge_and_unload, save_pretrained with tie_word_embeddings false) and export that"
        )


def _merged(
    adapter: Adapter, key: str, change: Change, stored: str, shape: tuple[int, ...]
) -> DenseTensor:
    """The weight ``stored`` in the checkpoint with an adapter's ``change``."""
    if change.saved:
        if change.down:
            raise CheckpointError(f"{adapter.folder} has {key} whole and as a change")
        _expect(adapter, change.saved, shape)
        if adapter.tensors[change.saved].dtype not in DTYPES:
            raise CheckpointError(f"{adapter.folder}: {change.saved} is quantized")
        return DenseTensor(shape, lambda _: _tensor(adapter, change.saved))
    rank = adapter.tensors[change.down].shape[0]
    if change.embedding:
        _expect(adapter, change.down, (rank, shape[0]))
        _expect(adapter, change.up, (shape[1], rank))
        if change.magnitude:
            raise CheckpointError(f"{adapter.folder}: DoRA of an embedding ({key}) is not read")
    else:
        _expect(adapter, change.down, (rank, *shape[1:]))
        _expect(adapter, change.up, (shape[0], rank, *(1 for _ in shape[2:])))
        if change.magnitude and len(shape) != 2:
            raise CheckpointError(f"{adapter.folder}: DoRA of {key} is not read")
    scaling = adapter.scaling(key.removesuffix(".weight"), rank)

    def compute(read: Read) -> torch.Tensor:
        down, up = _tensor(adapter, change.down), _tensor(adapter, change.up)
        delta = (up.flatten(1) @ down.flatten(1)) * scaling
        delta = delta.t() if change.embedding else delta.view(shape)
        merged = read(stored).float() + delta
        if change.magnitude:
            length = merged.norm(dim=1)
            merged *= (_tensor(adapter, change.magnitude).flatten() / length)[:, None]
        return merged

    return DenseTensor(shape, compute)


def _expect(adapter: Adapter, name: str, shape: tuple[int, ...]) -> None:
    found = adapter.tensors[name].shape
    if found != shape:
        raise CheckpointError(
            f"{adapter.folder}: {name} has shape {list(found)}, the base model asks for "
            f"{list(shape)}; is that its base model?"
        )


def _tensor(adapter: Adapter, name: str) -> torch.Tensor:
    with open_weights(adapter.tensors[name].file) as file:
        return file.get_tensor(name).float()
