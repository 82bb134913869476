"""PrefixKV budgets against a brute force and the released code."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from released_search import search_reference
from rows import profile_rows

from lvlm.core.errors import ParameterError
from lvlm.export.budgets.prefix_search import grid, mean_rows, search, search_fractions

VECTORS = sorted((Path(__file__).parents[2] / "data/caches").glob("prefixkv_*.npz"))


def every_threshold(layers: list[list[int]], target: int) -> list[int]:
    """The counts by trying each threshold there is, in exact arithmetic."""
    shares = []
    for scores in layers:
        ordered = sorted(scores, reverse=True)
        shares.append([Fraction(sum(ordered[: i + 1]), sum(ordered)) for i in range(len(scores))])

    def smallest_prefixes(p: Fraction) -> list[int]:
        return [next(i + 1 for i, share in enumerate(s) if share >= p) for s in shares]

    counts = [1] * len(layers)
    for p in sorted({x for s in shares for x in s}):
        wanted = smallest_prefixes(p)
        if sum(wanted) <= target:
            counts = wanted
            continue
        for layer, more in enumerate(wanted):
            counts[layer] += min(more - counts[layer], target - sum(counts))
        return counts
    # What received no attention at all is kept last.
    for layer, scores in enumerate(layers):
        counts[layer] += min(len(scores) - counts[layer], target - sum(counts))
    return counts


SCORES = st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any)


@given(layers=st.lists(SCORES, min_size=1, max_size=5), keep=st.floats(0.01, 1))
def test_search_is_what_trying_every_threshold_gives(layers: list[list[int]], keep: float) -> None:
    """Small whole scores: many ties within and between layers of unequal length."""
    target = max(round(keep * sum(map(len, layers))), len(layers))
    found = search([np.array(x, np.float32) for x in layers], keep)
    assert found.tolist() == every_threshold(layers, target)


def random_layers(rng: np.random.Generator) -> list[np.ndarray]:
    lengths = rng.integers(1, 60, size=int(rng.integers(1, 9)))
    return [rng.pareto(rng.uniform(0.3, 3), size=n) + 1e-12 for n in lengths]


def test_counts_sum_to_the_target_exactly() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        layers = random_layers(rng)
        keep = float(rng.choice([1.0, rng.uniform(1e-3, 1)], p=[0.05, 0.95]))
        counts = search([torch.from_numpy(x) for x in layers], keep)
        total = sum(map(len, layers))
        assert counts.sum() == max(round(keep * total), len(layers))
        assert (counts >= 1).all()
        assert all(n <= len(x) for n, x in zip(counts, layers, strict=True))


def test_a_layer_whose_attention_is_spread_keeps_more() -> None:
    sharp, flat = np.array([100.0] + [0.1] * 19), np.full(20, 1.0)
    assert search([sharp, flat], 0.5).tolist() == [1, 19]
    assert search([flat, sharp, flat], 0.5).tolist() == [15, 1, 14]  # a tie: the lower layer first


def test_fractions_are_of_each_layers_own_length() -> None:
    layers = [np.arange(1.0, 41), np.arange(1.0, 11)]
    for keep, row in zip((0.2, 0.7), search_fractions(layers, (0.2, 0.7)), strict=True):
        assert row.tolist() == (search(layers, keep) / [40, 10]).tolist()


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, math.nan])
def test_keep_out_of_range(keep: float) -> None:
    with pytest.raises(ParameterError, match="give a number above 0 and up to 1"):
        search([np.ones(4)], keep)
    with pytest.raises(ParameterError, match="above 0"):
        grid(keep)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "no layer"),
        ([np.ones(3), np.array([1, np.nan])], "layer 1 are not all finite"),
        ([np.array([1, np.inf])], "layer 0 are not all finite"),
        ([np.array([2.0, -1])], "layer 0 are not all finite and positive"),
        ([np.zeros(3)], "layer 0 are not all finite and positive"),
        ([np.ones((2, 2))], "shape (2, 2)"),
        ([np.ones(0)], "shape (0,)"),
    ],
)
def test_importances_that_cannot_be(layers: list[np.ndarray], message: str) -> None:
    with pytest.raises(ParameterError) as error:
        search(layers, 0.5)
    assert message in str(error.value)


def vector(path: Path) -> tuple[dict[str, Any], list[torch.Tensor], np.ndarray]:
    """meta, importances [1,N] of every layer, evicted fractions [L] as recorded."""
    with np.load(path) as arrays:
        meta = json.loads(str(arrays["meta"]))
        attention = [torch.from_numpy(arrays[f"attn_{i}"]) for i in range(meta["layers"])]
        return meta, [a.mean(1).sum(1) for a in attention], arrays["evicted_fraction_per_layer"]


@pytest.mark.parametrize("path", VECTORS, ids=[p.stem for p in VECTORS])
def test_reference_search_equals_the_released_code(path: Path) -> None:
    meta, importances, recorded = vector(path)
    evicted, sinks = meta["evicted_fraction"], meta["start_size"]
    found = search_reference(importances, evicted, sinks=sinks)
    np.testing.assert_array_equal(found, recorded)
    # Row 0 decides for the whole batch.
    batch = [torch.cat([s, s.flip(1) ** 3]) for s in importances]
    np.testing.assert_array_equal(search_reference(batch, evicted, sinks=sinks), recorded)
    # The paper's search agrees but for what the quirks move.
    kept = search([s[0] for s in importances], 1 - evicted) / meta["prompt"]
    assert 0 < np.abs(kept - (1 - found)).max() < 0.06


def test_there_are_three_vectors() -> None:
    assert len(VECTORS) == 3


def test_reference_search_ends_where_no_threshold_fits() -> None:
    """All attention on one entry: either nearly all is evicted, or, at full share, nothing."""
    one = torch.nn.functional.one_hot(torch.tensor([0]), 100).float()
    assert search_reference([one, one], 0.3).tolist() == [0.3, 0.3]
    assert search_reference([torch.ones(1, 3)], 0.0).tolist() == [0.0]


def test_rows_have_the_asked_mean_exactly() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        layers = int(rng.integers(1, 9))
        samples = [[rng.pareto(0.5, rng.integers(1, 50)) for _ in range(layers)] for _ in range(3)]
        keeps = grid(float(rng.uniform(0.01, 1)))
        for row in profile_rows(samples, keeps):
            assert abs(sum(row.fractions) / layers - row.keep) < 1e-12
            assert all(0 < x <= 1 for x in row.fractions)


def test_rows_are_the_samples_means() -> None:
    """Where lengths are equal the mean over the samples needs next to no correction."""
    rng = np.random.default_rng(2)
    samples = [[rng.pareto(1, 1000) for _ in range(4)] for _ in range(3)]
    (row,) = profile_rows(samples, (0.3,))
    means = np.mean([search(s, 0.3) for s in samples], axis=0) / 1000
    np.testing.assert_allclose(row.fractions, means, rtol=1e-12)
    assert np.ptp(means) > 0.01


def test_what_exceeds_a_layer_goes_to_the_others_in_proportion() -> None:
    (row,) = mean_rows(np.array([[[0.9, 0.4, 0.1]]]), (0.7,))
    assert row.fractions == pytest.approx((1.0, 0.88, 0.22), abs=1e-15)
    (row,) = mean_rows(np.array([[[0.9, 0.8, 0.1]]]), (0.9,))
    assert row.fractions == pytest.approx((1.0, 1.0, 0.7), abs=1e-15)
    (row,) = mean_rows(np.array([[[0.9, 0.8, 0.1]]]), (1.0,))
    assert row.fractions == (1.0, 1.0, 1.0)


def test_grid_rises_and_holds_the_asked_keep_once() -> None:
    assert grid(0.2) == tuple(i / 20 for i in range(1, 20))
    assert grid(0.22)[3:5] == (0.2, 0.22)
    assert grid(0.01)[0] == 0.01
    assert grid(1.0)[-1] == 1.0
