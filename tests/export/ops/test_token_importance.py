"""``TokenImportance`` against loops over rows, heads and queries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm.core.errors import ParameterError
from lvlm.export.ops.token_importance import OP


def by_loops(
    query: np.ndarray,
    key: np.ndarray,
    index: np.ndarray,
    ids: np.ndarray,
    scale: float,
    softcap: float,
) -> np.ndarray:
    batch, heads, rows, _ = query.shape
    group = heads // key.shape[1]
    importance = np.zeros(ids.shape)
    for b in range(batch):
        used = [r for r in range(rows) if index[b, r] >= 0]
        for r in used:
            seen = [j for j in range(ids.shape[1]) if j <= index[b, r] and ids[b, j] >= 0]
            for h in range(heads):
                logits = [float(query[b, h, r] @ key[b, h // group, j]) * scale for j in seen]
                if softcap:
                    logits = [softcap * math.tanh(x / softcap) for x in logits]
                weights = [math.exp(x - max(logits)) for x in logits]
                for j, weight in zip(seen, weights, strict=True):
                    importance[b, j] += weight / sum(weights) / (len(used) * heads)
    return importance


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, ...]:
    batch, length, rows = (draw(st.integers(1, n)) for n in (3, 9, 3))
    key_heads, group, width = (draw(st.integers(1, n)) for n in (2, 3, 4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    query = torch.randn(batch, key_heads * group, rows, width, generator=random)
    key = torch.randn(batch, key_heads, length, width, generator=random)
    row = st.lists(st.sampled_from([-1, 0, 1, 2]), min_size=length, max_size=length)
    ids = torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))
    index = st.lists(st.integers(-1, length - 1), min_size=rows, max_size=rows)
    return query, key, torch.tensor(draw(st.lists(index, min_size=batch, max_size=batch))), ids


@settings(max_examples=examples(100), deadline=None)
@given(cases(), st.sampled_from([0.0, 0.6]))
def test_matches_loops(case: tuple[torch.Tensor, ...], softcap: float) -> None:
    (found,) = OP(*case, scale=0.7, softcap=softcap)
    query, key, index, ids = (t.numpy() for t in case)
    expected = by_loops(query.astype(np.float64), key.astype(np.float64), index, ids, 0.7, softcap)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@settings(max_examples=examples(50), deadline=None)
@given(cases(), st.integers(1, 3))
def test_padding_and_other_rows_change_nothing(case: tuple[torch.Tensor, ...], more: int) -> None:
    query, key, index, ids = case
    (expected,) = OP(query[:1], key[:1], index[:1], ids[:1], scale=0.5)
    (found,) = OP(
        query,
        torch.nn.functional.pad(key, (0, 0, more, more), value=float("nan")),
        torch.where(index >= 0, index + more, -1),
        torch.nn.functional.pad(ids, (more, more), value=-1),
        scale=0.5,
    )
    np.testing.assert_allclose(found[0, more:-more], expected[0], atol=1e-6)
    assert not found[:, :more].any()
    assert not found[:, -more:].any()


def test_a_full_row_is_a_distribution() -> None:
    sample = next(iter(OP.samples()))
    (found,) = OP(*sample.inputs, **sample.attributes)
    assert found.sum().item() == pytest.approx(1, abs=1e-6)


def test_heads_that_do_not_divide_are_refused() -> None:
    index, ids = torch.tensor([[3]]), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ParameterError, match="3 query heads are no multiple of 2 key heads"):
        OP(torch.zeros(1, 3, 1, 8), torch.zeros(1, 2, 4, 8), index, ids, scale=1.0)
    with pytest.raises(ParameterError, match="do not fit"):
        OP(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 4, 6), index, ids, scale=1.0)
