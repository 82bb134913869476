"""A torch model that multiplies with packed weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor, Unpacked
from lvlm.export.weights.packed_linears import PackedLinear, exchange_linears
from lvlm.export.weights.stored_weights import StoredLinear


def test_small_layers_hold_the_weight_and_large_ones_make_it() -> None:
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"block": nn.Sequential(nn.Linear(32, 3)), "head": nn.Linear(32, 5)})
    model.head.__class__ = StoredLinear  # as what is large in a file
    numbers, scales = torch.randint(0, 16, (8, 32), dtype=torch.uint8), torch.rand(8, 2)
    packed, wanted = {}, {}
    for name, rows in {"block.0.weight": slice(0, 3), "head.weight": slice(3, 8)}.items():
        parts = Unpacked(numbers[rows], scales[rows], None)
        shape = (len(parts.numbers), 32)
        packed[name] = PackedTensor(shape, 4, 2, True, lambda _, parts=parts: parts)
        spread = scales[rows].repeat_interleave(16, dim=1)
        wanted[name] = (numbers[rows].float() - 8) * spread
    language: Any = SimpleNamespace(blocks=[model.block], head=model.head)
    exchange_linears(model, language, packed)
    assert isinstance(model.head, PackedLinear)
    x = torch.randn(4, 32)
    for layer, name in ((model.block[0], "block.0.weight"), (model.head, "head.weight")):
        torch.testing.assert_close(layer(x), x @ wanted[name].t() + layer.bias)
