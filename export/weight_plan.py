"""Storage of a bundle's linear layers: as options say, or as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product

import torch

from lvlm.core.errors import ParameterError
from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor
from lvlm.export.export_options import CACHES, ExportOptions
from lvlm.export.graphs.skeleton import Skeleton
from lvlm.export.targets.target import Target
from lvlm.export.weights.quantization import linear_weights


def check_storage(options: ExportOptions, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """ParameterError where options do not go with one another, with the form that the checkpoint
    has, or with a target."""
    quantized = [form for form in checkpoint.forms if form.quantized]
    if options.dequantize and not quantized:
        raise ParameterError("--dequantize: the checkpoint is not quantized; leave it out")
    kept = [] if options.dequantize else quantized
    for form in kept:
        if form.unkept:
            raise ParameterError(
                f"the checkpoint is quantized ({form.words}) and cannot stay so: {form.unkept}; "
                "give --dequantize (and --weights int4 to quantize anew)"
            )
        if options.weights is not None:
            raise ParameterError(
                f"--weights {options.weights}: the checkpoint is quantized ({form.words}); leave "
                "it out, or add --dequantize to quantize anew"
            )
    for what, mend in _low_precision(options, dtype, bool(kept)):
        if dtype == torch.bfloat16:
            raise ParameterError(f"{what} goes with --dtype fp32 or fp16; the model is bf16{mend}")
    for target in options.targets:
        _check_target(options, target, dtype)


def _check_target(options: ExportOptions, target: Target, dtype: torch.dtype) -> None:
    """ParameterError where ``target`` does not take what options store in lower precision."""
    if (how := options.quantization) is not None:
        refusal = target.refusal(how.bits, how.block, whole=how.whole)
        if refusal is not None:
            raise ParameterError(refusal)
    if _low_precision_cache(options, dtype) and not target.low_precision:
        raise ParameterError(
            f"target {target.name} does not take --cache {options.cache}; leave one of them out"
        )


def check_packed(targets: Iterable[Target], packed: Iterable[PackedTensor]) -> None:
    """ParameterError where a target does not take weights that stay quantized."""
    for target, tensor in product(targets, packed):
        refusal = target.refusal(tensor.bits, tensor.block or 0, whole=tensor.groups == 1)
        if refusal is not None:
            raise ParameterError(
                f"{refusal.partition('; ')[0]}, which the checkpoint has; give --dequantize"
            )


def _low_precision(
    options: ExportOptions, dtype: torch.dtype, kept: bool
) -> Iterator[tuple[str, str]]:
    """Flags that store lower precision than is computed in, and what else helps."""
    if options.weights is not None:
        yield f"--weights {options.weights}", ""
    if kept:
        yield "a checkpoint that stays quantized", ", or give --dequantize"
    if _low_precision_cache(options, dtype):
        yield f"--cache {options.cache}", ""


def _low_precision_cache(options: ExportOptions, dtype: torch.dtype) -> bool:
    return options.cache is not None and (CACHES[options.cache] != dtype or dtype == torch.bfloat16)


def packed_linears(
    options: ExportOptions,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    stored_names: Mapping[str, str],
) -> dict[str, PackedTensor]:
    """The linear layers' tensors that stay quantized, by name in the checkpoint; what else is
    quantized there is made dense."""
    if options.dequantize:
        return {}
    linears = (stored_names[n] for n in linear_weights(skeleton.model, skeleton.language))
    return {name: checkpoint.packed[name] for name in linears if name in checkpoint.packed}


def added_bytes(
    options: ExportOptions,
    skeleton: Skeleton,
    packed: Mapping[str, PackedTensor],
    dtype: torch.dtype,
) -> int:
    """Bytes that quantization adds to those of the weights in ``dtype``; ParameterError if it
    cannot be done."""
    added = sum(_packed_bytes(tensor, dtype) for tensor in packed.values())
    how = options.quantization
    if how is None:
        return added
    shared = {id(p) for p in skeleton.language.embed.parameters()}
    zero_points = 0
    for name, weight in linear_weights(skeleton.model, skeleton.language).items():
        how.check(name, weight.shape[1])
        blocks = weight.numel() // how.block
        zero_points = max(zero_points, blocks * how.bits // 8)
        added += weight.numel() * how.bits // 8 + blocks * dtype.itemsize
        if id(weight) not in shared:
            added -= weight.numel() * dtype.itemsize
    return added + zero_points


def _packed_bytes(tensor: PackedTensor, dtype: torch.dtype) -> int:
    """Bytes of numbers, scales and zero points, without those of the weight in ``dtype``."""
    numbers, blocks = tensor.shape[0] * tensor.shape[1], 0
    if tensor.block is not None:
        blocks = numbers // tensor.block
    zero_points = 0 if tensor.symmetric else blocks * tensor.bits // 8
    stored = numbers * tensor.bits // 8 + blocks * dtype.itemsize + zero_points
    return stored - numbers * dtype.itemsize
