"""Tensors of a quantized checkpoint by the layer that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lvlm.core.errors import CheckpointError
from lvlm.export.checkpoint.checkpoint_form import DenseTensor, Form, MadeTensor, Source
from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor
from lvlm.export.checkpoint.weight_files import Stored


def modules_with(found: Source, suffix: str, method: str) -> list[str]:
    """Names of the layers with a tensor ``suffix``; CheckpointError where there are none, though
    config.json says that the weights are quantized."""
    end = f".{suffix}"
    names = [name.removesuffix(end) for name in found.tensors if name.endswith(end)]
    if not names:
        raise CheckpointError(
            f"{found.source}: config.json says that the weights are quantized with {method}, but "
            f"none is named *.{suffix}; if they are not, remove quantization_config from it"
        )
    return names


def part(found: Source, module: str, suffix: str, dims: int = 2) -> Stored:
    """A tensor of a layer; CheckpointError where it is missing or has not ``dims`` axes."""
    stored = found.tensors.get(f"{module}.{suffix}")
    if stored is None:
        raise CheckpointError(f"{found.source} lacks the weight {module}.{suffix}")
    if len(stored.shape) != dims:
        raise misshapen(found, module, suffix)
    return stored


def misshapen(found: Source, module: str, suffix: str) -> CheckpointError:
    """The error of a tensor whose shape does not fit the others of its layer."""
    shape = list(found.tensors[f"{module}.{suffix}"].shape)
    return CheckpointError(
        f"{found.source}: {module}.{suffix} has shape {shape}, which does not go with the other "
        "tensors of the layer; is the checkpoint complete?"
    )


def refuse(method: str, what: str, instead: str) -> CheckpointError:
    """The error of a way to quantize that is not supported."""
    return CheckpointError(f"the checkpoint is quantized with {method}, {what}; {instead}")


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model, not quantized."""
    drop = ("quantization_config", "compression_config")
    return {name: value for name, value in config.items() if name not in drop}


def make_form(
    method: str,
    found: Source,
    made: Mapping[str, PackedTensor | DenseTensor],
    parts: Sequence[str],
    unkept: str = "",
) -> Form:
    """The form of tensors ``made`` by layer, whose weights are ``parts`` of it in the files."""
    tensors: dict[str, MadeTensor] = {f"{module}.weight": made[module] for module in made}
    packed = [tensor for tensor in made.values() if isinstance(tensor, PackedTensor)]
    if not unkept:
        unkept = next(
            (
                f"groups of {tensor.shape[1] / tensor.groups:g} numbers are no blocks of a bundle "
                f"({module})"
                for module, tensor in made.items()
                if isinstance(tensor, PackedTensor) and tensor.block is None
            ),
            "",
        )
    names = (f"{module}.{suffix}" for module in made for suffix in parts)
    return Form(
        words=f"{method}, {_kinds(packed)}" if packed else method,
        made=tensors,
        used=frozenset(name for name in names if name in found.tensors),
        config=without_settings(found.config),
        quantized=True,
        unkept=unkept,
    )


def _kinds(packed: Iterable[PackedTensor]) -> str:
    """int4 in groups of 128 with zero points, for 196 linear layers."""
    counts: dict[str, int] = {}
    for tensor in packed:
        zero = "" if tensor.symmetric else " with zero points"
        group = f"{tensor.shape[1] / tensor.groups:g}"
        kind = f"int{tensor.bits} in groups of {group}{zero}"
        if tensor.groups == 1:
            kind = f"int{tensor.bits} with a scale per output{zero}"
        counts[kind] = counts.get(kind, 0) + 1
    return "; ".join(f"{kind} ({count} layers)" for kind, count in counts.items())
