"""Weights that stay as they are stored, and compute in fp32."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lvlm.export.weights.stored_weights import StoredEmbedding, StoredLinear, compute_in_fp32


def test_weights_stay_as_they_are_stored() -> None:
    model = nn.Sequential(
        nn.Embedding(1 << 14, 1 << 10), nn.Linear(1 << 10, 1 << 11), nn.Linear(2048, 3)
    )
    model.to(torch.bfloat16)
    expected = [p.detach().float() for p in model.parameters()]
    data = model[1].weight.data_ptr()
    compute_in_fp32(model)
    assert [type(m) for m in model] == [StoredEmbedding, StoredLinear, nn.Linear]
    assert model[1].weight.data_ptr() == data
    ids = torch.tensor([[1, 5]])
    rows = nn.functional.embedding(ids, expected[0])
    middle = nn.functional.linear(rows, expected[1], expected[2])
    torch.testing.assert_close(model(ids), nn.functional.linear(middle, expected[3], expected[4]))


def test_rows_of_a_stored_weight_are_rounded_to_the_bundles_dtype() -> None:
    layer = nn.Sequential(nn.Linear(1 << 10, 1 << 10, bias=False))
    exact = layer[0].weight.detach().clone()
    compute_in_fp32(layer, torch.bfloat16)
    x = torch.ones(1, 1 << 10)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, exact.bfloat16().float()))
    assert np.array_equal(layer[0].weight.numpy(), exact.numpy())
