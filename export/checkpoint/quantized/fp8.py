"""fp8 weights with a scale for each block of both axes, or for the whole weight; as DeepSeek and
Qwen publish them (quant_method fp8), and by FBGEMM with a scale per output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lvlm.export.checkpoint.checkpoint_form import DenseTensor, Form, Read, Source
from lvlm.export.checkpoint.quantized.parts.module_tensors import (
    make_form,
    misshapen,
    modules_with,
)

PARTS = ("weight", "weight_scale_inv", "weight_scale", "input_scale", "activation_scale")


class Fp8:
    """See Scheme. weight [N,K] of 8 bits; weight_scale_inv or weight_scale, by which it is
    multiplied, of one number for equal blocks of the weight."""

    name = "fp8"
    methods = ("fp8", "fbgemm_fp8")

    def read(self, settings: Mapping[str, Any], found: Source) -> Form:
        scale = "weight_scale_inv"
        if not any(name.endswith(f".{scale}") for name in found.tensors):
            scale = "weight_scale"
        block = settings.get("weight_block_size")
        sizes = tuple(block) if isinstance(block, list | tuple) else None
        made = {
            module: scaled(found, module, scale, sizes)
            for module in modules_with(found, scale, "fp8")
        }
        words = f"fp8 ({len(made)} layers)"
        return make_form(words, found, made, PARTS, "no graph here multiplies with fp8")


def scaled(
    found: Source, module: str, scale: str, block: tuple[int, ...] | None = None
) -> DenseTensor:
    """A layer's weight times its scales: one for all, one for each output or for each of equal runs
    of its inputs, or one for each ``block`` (outputs, inputs), the last of which may be cut
    short."""
    name = f"{module}.weight"
    if name not in found.tensors or len(found.tensors[name].shape) != 2:
        raise misshapen(found, module, scale)
    outputs, inputs = found.tensors[name].shape
    shape = found.tensors[f"{module}.{scale}"].shape
    if shape in ((), (1,), (1, 1)):
        rows, columns = outputs, inputs
    elif shape == (outputs,) or (len(shape) == 2 and shape[0] == outputs and _runs(inputs, shape)):
        rows, columns = 1, inputs // (shape[1] if len(shape) == 2 else 1)
    elif block is not None and len(block) == 2 and _blocks((outputs, inputs), block) == shape:
        rows, columns = block
    else:
        raise misshapen(found, module, scale)

    def compute(read: Read) -> torch.Tensor:
        weight, factors = read(name).float(), read(f"{module}.{scale}").float()
        factors = factors.reshape(_blocks((outputs, inputs), (rows, columns)))
        spread = factors.repeat_interleave(rows, 0)[:outputs]
        for number, first in enumerate(range(0, inputs, columns)):
            weight[:, first : first + columns] *= spread[:, number, None]
        return weight

    return DenseTensor((outputs, inputs), compute)


def _runs(inputs: int, shape: tuple[int, ...]) -> bool:
    return shape[1] > 0 and inputs % shape[1] == 0


def _blocks(shape: tuple[int, int], block: tuple[int, ...]) -> tuple[int, int]:
    """Numbers of a weight's blocks along each axis."""
    rows, columns = (-(-size // max(1, step)) for size, step in zip(shape, block, strict=True))
    return rows, columns


SCHEME = Fp8()
