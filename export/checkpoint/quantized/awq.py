"""AWQ as AutoAWQ and its successors write it (version gemm): int4, zero points, groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lvlm.export.checkpoint.checkpoint_form import Form, Read, Source
from lvlm.export.checkpoint.quantized.parts.bit_fields import fields_of
from lvlm.export.checkpoint.quantized.parts.module_tensors import (
    make_form,
    misshapen,
    modules_with,
    part,
    refuse,
)
from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor, Unpacked

# Of eight outputs that share a word: which one lies at each place, from the lowest bits on
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq:
    """See Scheme. qweight [K,N/8] and qzeros [G,N/8] int32, scales [G,N]."""

    name = "AWQ"
    methods = ("awq",)

    def read(self, settings: Mapping[str, Any], found: Source) -> Form:
        bits, version = settings.get("bits", 4), str(settings.get("version", "gemm")).lower()
        if bits != 4:
            raise refuse("AWQ", f"{str(bits)[:20]} bits", "4 are supported")
        if version != "gemm":
            raise refuse("AWQ", f"version {version[:40]}", "gemm is supported")
        modules = modules_with(found, "qweight", "awq")
        made = {module: _tensor(found, module) for module in modules}
        return make_form("AWQ", found, made, ("qweight", "qzeros", "scales"))


def _tensor(found: Source, module: str) -> PackedTensor:
    (inputs, words), (groups, outputs) = (
        part(found, module, name).shape for name in ("qweight", "scales")
    )
    if words * 8 != outputs:
        raise misshapen(found, module, "qweight")
    if part(found, module, "qzeros").shape != (groups, words):
        raise misshapen(found, module, "qzeros")

    def unpack(read: Read) -> Unpacked:
        return Unpacked(
            _in_order(read(f"{module}.qweight")),
            read(f"{module}.scales").float().t().contiguous(),
            _in_order(read(f"{module}.qzeros")),
        )

    return PackedTensor((outputs, inputs), 4, groups, symmetric=False, unpack=unpack)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """[R, N/8] words -> [N,R] numbers."""
    rows = len(words)
    places = torch.tensor(ORDER).argsort()
    found = fields_of(words, 4, axis=1).view(rows, -1, 8)[..., places]
    return found.reshape(rows, -1).t().contiguous()


SCHEME = Awq()
