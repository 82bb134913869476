"""GPTQ as AutoGPTQ and GPTQModel write it: int4 and int8, groups, zero points, act-order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lvlm.core.errors import CheckpointError
from lvlm.export.checkpoint.checkpoint_form import DenseTensor, Form, Read, Source
from lvlm.export.checkpoint.quantized.parts.bit_fields import fields_of
from lvlm.export.checkpoint.quantized.parts.module_tensors import (
    make_form,
    misshapen,
    modules_with,
    part,
    refuse,
)
from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor, Unpacked

FORMATS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> what is missing in stored zero points
PARTS = ("qweight", "qzeros", "scales", "g_idx")


class Gptq:
    """See Scheme. qweight [K * bits / 32,N] and qzeros [G,N * bits / 32] int32, scales [G,N],
    g_idx [K]: the group of every input, in order unless act-order was on."""

    name = "GPTQ"
    methods = ("gptq",)

    def read(self, settings: Mapping[str, Any], found: Source) -> Form:
        bits, form = settings.get("bits"), settings.get("checkpoint_format", "gptq")
        if bits not in (4, 8):
            raise refuse("GPTQ", f"{str(bits)[:20]} bits", "4 and 8 are supported")
        if form not in FORMATS:
            known = " and ".join(FORMATS)
            raise refuse("GPTQ", f"checkpoint_format {str(form)[:40]}", f"{known} are supported")
        how = bits, bool(settings.get("sym", True)), FORMATS[form]
        layers = {
            module: GptqLayer(found, module, *how)
            for module in modules_with(found, "qweight", "gptq")
        }
        if not settings.get("desc_act") or not any(x.act_order() for x in layers.values()):
            packed = {module: layer.packed() for module, layer in layers.items()}
            return make_form("GPTQ", found, packed, PARTS)
        made = {module: layer.scattered() for module, layer in layers.items()}
        method = f"GPTQ, int{bits} in act-order"
        return make_form(method, found, made, PARTS, "act-order (desc_act)")


@dataclass(frozen=True)
class GptqLayer:
    """A linear layer's tensors; ``add``: what is missing in its stored zero points."""

    found: Source
    module: str
    bits: int
    symmetric: bool
    add: int

    def __post_init__(self) -> None:
        inputs, outputs = self.shape[1], self.shape[0]
        if part(self.found, self.module, "scales").shape[1] != outputs:
            raise misshapen(self.found, self.module, "scales")
        zeros = (self.groups, outputs * self.bits // 32)
        if part(self.found, self.module, "qzeros").shape != zeros:
            raise misshapen(self.found, self.module, "qzeros")
        if self.has_order and part(self.found, self.module, "g_idx", 1).shape != (inputs,):
            raise misshapen(self.found, self.module, "g_idx")

    @property
    def shape(self) -> tuple[int, int]:
        rows, outputs = part(self.found, self.module, "qweight").shape
        return outputs, rows * 32 // self.bits

    @property
    def groups(self) -> int:
        return part(self.found, self.module, "scales").shape[0]

    @property
    def has_order(self) -> bool:
        return f"{self.module}.g_idx" in self.found.tensors

    def act_order(self) -> bool:
        """True where groups are not runs of inputs; what is not here is taken at its word."""
        if not self.has_order or self.found.absent:
            return self.has_order
        return not self._in_order(self.found.read(f"{self.module}.g_idx"))

    def packed(self) -> PackedTensor:
        return PackedTensor(self.shape, self.bits, self.groups, self.symmetric, self._unpack)

    def scattered(self) -> DenseTensor:
        """The weight where each input names its group."""

        def compute(read: Read) -> torch.Tensor:
            parts, group = self._parts(read), read(f"{self.module}.g_idx").long()
            halfway = 1 << (self.bits - 1)
            zero = halfway if parts.zero_points is None else parts.zero_points.float()[:, group]
            return (parts.numbers.float() - zero) * parts.scales[:, group]

        return DenseTensor(self.shape, compute)

    def _unpack(self, read: Read) -> Unpacked:
        if self.has_order and not self._in_order(read(f"{self.module}.g_idx")):
            raise CheckpointError(
                f"{self.found.source}: {self.module}.g_idx is in act-order, which config.json does "
                "not say; set desc_act to true there"
            )
        return self._parts(read)

    def _in_order(self, group: torch.Tensor) -> bool:
        run = -(-len(group) // self.groups)
        return torch.equal(group.long(), torch.arange(len(group)) // run)

    def _parts(self, read: Read) -> Unpacked:
        zeros = fields_of(read(f"{self.module}.qzeros"), self.bits, axis=1).t().contiguous()
        if self.add and bool((zeros == (1 << self.bits) - 1).any()):
            # Readers differ on it: one past the largest number, or zero
            raise CheckpointError(
                f"{self.found.source}: {self.module}.qzeros has zero points out of range; "
                "export the original weights with --weights int4"
            )
        zeros += self.add
        if self.symmetric and not bool((zeros == 1 << (self.bits - 1)).all()):
            raise CheckpointError(
                f"{self.found.source}: {self.module}.qzeros has zero points, but config.json says "
                "sym; set it to false there"
            )
        return Unpacked(
            fields_of(read(f"{self.module}.qweight"), self.bits, axis=0).t().contiguous(),
            read(f"{self.module}.scales").float().t().contiguous(),
            None if self.symmetric else zeros,
        )


SCHEME = Gptq()
