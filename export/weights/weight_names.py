"""Stored tensors of the parameters: names and ties, as transformers has them on loading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lvlm.core.errors import CheckpointError
from lvlm.export.checkpoint.checkpoint import DTYPES, Checkpoint
from lvlm.export.checkpoint.model_shape import build_shape, skeleton_of
from lvlm.export.families.family import Family
from lvlm.export.graphs.skeleton import Skeleton

LAYERS = ("num_hidden_layers", "depth")


def open_skeleton(
    checkpoint: Checkpoint, family: Family, config: Any, dtype: torch.dtype
) -> tuple[Skeleton, dict[str, str]]:
    """The model without its weights, of ``dtype``, and parameter name -> stored name.

    Where the configuration ties two parameters and the files hold both with different values, they
    stay apart, as in transformers: ``config`` is changed to say so. A weight that is missing, left
    over, there twice or of another shape is a CheckpointError that names it.
    """
    _bound_layers(config.to_dict(), len(checkpoint.tensors))
    model: Any = build_shape(family, config, dtype)
    stored = _match(checkpoint, model)
    if any(_differ(checkpoint, stored, *pair) for pair in model.all_tied_weights_keys.items()):
        config.tie_word_embeddings = False
        model = build_shape(family, config, dtype)
    names = _complete(checkpoint, model, stored)
    return skeleton_of(family, config, model, dtype), names


def _bound_layers(config: Mapping[str, Any], tensors: int) -> None:
    """A number of layers that is a mistake would take hours to build."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _bound_layers(value, tensors)
        elif name in LAYERS and isinstance(value, int) and value > tensors:
            raise CheckpointError(
                f"config.json says {name} {str(value)[:40]}, the files hold {tensors} tensors"
            )


def renamed(model: Any, keys: Iterable[str]) -> dict[str, str | None]:
    """Stored name -> the model's name by transformers' own renamings; None: a leftover."""
    mapping = get_model_conversion_mapping(model)
    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    converters = [x for x in mapping if isinstance(x, WeightConverter)]
    known = dict.fromkeys(model.state_dict(), True)
    found: dict[str, str] = {}
    for key in keys:
        name, converter = rename_source_key(
            key, renamings, converters, model.base_model_prefix, known
        )
        if converter is not None:
            raise CheckpointError(
                f"{key} is stored in another form than the model has it; load the checkpoint with "
                "transformers, save it (save_pretrained) and export that"
            )
        if name not in known and key in known:
            name, _ = rename_source_key(key, [], [], model.base_model_prefix, known)
        found[key] = name
    # Tables that older versions stored although they follow from the configuration
    unknown = {name for name in found.values() if name not in known}
    info = SimpleNamespace(missing_keys=set(), unexpected_keys=unknown)
    model._adjust_missing_and_unexpected_keys(info)
    leftovers = unknown - info.unexpected_keys
    return {key: None if name in leftovers else name for key, name in found.items()}


def _match(checkpoint: Checkpoint, model: Any) -> dict[str, str]:
    """Parameter name -> stored name of what the files hold, every name, shape and type checked."""
    wanted = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    stored: dict[str, str] = {}
    for key, name in renamed(model, checkpoint.tensors).items():
        tensor = checkpoint.tensors[key]
        if name is None:
            continue
        if name not in wanted:
            raise CheckpointError(f"{checkpoint.source} has a weight the model lacks: {key[:200]}")
        if name in stored:
            raise CheckpointError(
                f"{checkpoint.source} has {stored[name]} and {key} for one weight"
            )
        if tensor.shape != wanted[name]:
            raise CheckpointError(
                f"{checkpoint.source}: {key} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(wanted[name])}"
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{checkpoint.source}: {key} is stored as {tensor.dtype}: the checkpoint is "
                "quantized; export the original weights"
            )
        stored[name] = key
    return stored


def _complete(checkpoint: Checkpoint, model: nn.Module, stored: dict[str, str]) -> dict[str, str]:
    """``stored`` with every parameter: tied ones take the tensor of the one they share."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shared: dict[int, str] = {}
    for name, key in stored.items():
        shared.setdefault(id(parameters[name]), key)
    missing = [n for n, p in parameters.items() if n not in stored and id(p) not in shared]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{checkpoint.source} lacks the weight {missing[0]}{more}")
    return {n: stored.get(n) or shared[id(p)] for n, p in parameters.items()}


def _differ(checkpoint: Checkpoint, stored: dict[str, str], target: str, source: str) -> bool:
    """True where both of a tied pair are stored, with different values."""
    if target not in stored or source not in stored:
        return False
    return not checkpoint.equal(stored[target], stored[source])
