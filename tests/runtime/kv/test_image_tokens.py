"""Counts of image tokens against the formulas of the recipe, written out plainly."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm.core.errors import ParameterError
from lvlm.runtime.bundle.manifest import Reduction
from lvlm.runtime.kv.image_tokens import keep_ratios, kept, plan_prefill, recycled, tokens_per_layer

THREE = tuple(Reduction(layer, (i + 1) / 3, None, 0.1) for i, layer in enumerate((1, 3, 4)))
FIXED = tuple(
    Reduction(layer, None, ratio, None) for layer, ratio in ((1, 0.7), (3, 0.5), (4, 0.35))
)

ratios = st.floats(0.001, 1.0)
lists_of_ratios = st.lists(ratios, min_size=3, max_size=3).map(lambda r: sorted(r, reverse=True))


def half_to_even(x: Fraction) -> int:
    """Python's round, from its definition."""
    down = x.numerator // x.denominator
    over = x - down
    if over == Fraction(1, 2):
        return down + down % 2
    return down + (over > Fraction(1, 2))


@given(st.integers(1, 5000), ratios)
def test_kept_is_the_rounded_share_but_at_least_one(tokens: int, ratio: float) -> None:
    assert kept(tokens, ratio) == max(1, half_to_even(Fraction(tokens * ratio)))
    assert 1 <= kept(tokens, ratio) <= tokens


def test_kept_rounds_halves_to_even() -> None:
    assert [kept(v, 0.5) for v in (1, 3, 5, 7, 9)] == [1, 2, 2, 4, 4]


@given(st.integers(0, 5000), st.one_of(st.none(), ratios))
def test_recycled(count: int, fraction: float | None) -> None:
    expected = 0
    if fraction is not None and count > 1:
        expected = max(1, half_to_even(Fraction(fraction * count)))
    assert recycled(count, fraction) == expected


@given(ratios)
def test_a_number_is_the_last_fraction(keep: float) -> None:
    expected = [keep ** (1 / 3), keep ** (2 / 3), keep]
    np.testing.assert_allclose(keep_ratios(THREE, 0.35, keep), expected)
    np.testing.assert_allclose(keep_ratios(THREE, keep, None), expected)
    assert keep_ratios(THREE, 0.35, keep)[-1] == keep


@given(lists_of_ratios)
def test_a_list_is_taken_as_it_is(keep: list[float]) -> None:
    assert keep_ratios(THREE, 0.35, keep) == tuple(keep)
    assert keep_ratios(FIXED, 0.35, keep) == tuple(keep)


def test_own_schedule_of_a_bundle() -> None:
    assert keep_ratios(FIXED, 0.35, None) == (0.7, 0.5, 0.35)
    with pytest.raises(ParameterError, match="as a list of 3 fractions"):
        keep_ratios(FIXED, 0.35, 0.35)


def test_without_reductions() -> None:
    assert keep_ratios((), 1.0, None) == ()
    assert keep_ratios((), 1.0, 1.0) == ()
    for keep in (0.5, [0.5]):
        with pytest.raises(ParameterError, match="needs a bundle with fewer image tokens"):
            keep_ratios((), 1.0, keep)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (0, "keep is 0; give a number above 0"),
        (0.0, "above 0 and up to 1"),
        (-0.5, "above 0 and up to 1"),
        (1.01, "above 0 and up to 1"),
        (float("nan"), "above 0 and up to 1"),
        (float("inf"), "above 0 and up to 1"),
        ([0.5, 0.4, 0.0], "above 0 and up to 1"),
        ([0.5, "0.4", 0.3], "keep is '0.4'"),
        ([0.5, None, 0.3], "keep is None"),
        ("0.5", "keep is '0.5'; give a number, or a list"),
        ({0.5}, "give a number, or a list"),
        ([], "keep has 0 fractions for 3 reductions"),
        ([0.5, 0.4], "keep has 2 fractions for 3 reductions"),
        ([0.5, 0.4, 0.3, 0.2], "keep has 4 fractions for 3 reductions"),
        ([0.3, 0.4, 0.5], "must not rise"),
    ],
)
def test_unusable_keep(keep: Any, said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        keep_ratios(THREE, 0.35, keep)


@given(st.integers(1, 3000), lists_of_ratios)
def test_tokens_entering_each_block(tokens: int, keep: list[float]) -> None:
    a, b, c = (max(1, round(tokens * k)) for k in keep)
    assert tokens_per_layer(THREE, keep, tokens, 6) == [tokens, a, a, b, c, c]


rows = st.lists(
    st.tuples(
        st.integers(1, 50),  # text tokens
        st.lists(st.integers(1, 40), max_size=3),  # image tokens of each image
        st.integers(0, 20),  # tokens after the last image
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(rows, lists_of_ratios)
def test_plan(batch: list[tuple[int, list[int], int]], keep: list[float]) -> None:
    text, images, tail = (list(column) for column in zip(*batch, strict=True))
    plan = plan_prefill(THREE, keep, 6, text, images, tail)
    size, max_images = len(batch), max(1, *map(len, images))
    assert all(a.dtype == np.int64 for a in (plan.entries, *plan.inputs.values()))

    stage_of_layer = [None, 0, 0, 1, 2, 2]
    for layer, stage in enumerate(stage_of_layer):
        for b in range(size):
            left = [n if stage is None else max(1, round(n * keep[stage])) for n in images[b]]
            assert plan.entries[layer, b] == text[b] + sum(left)

    before = [0, 1, 3]  # the layer whose input each reduction takes up
    assert plan.maps == tuple(plan.entries[layer].max() for layer in before)
    for stage, layer in enumerate((1, 3, 4)):
        counts, centres = plan.inputs[f"keep_{stage}"], plan.inputs[f"recycle_{stage}"]
        assert counts.shape == centres.shape == (size, max_images)
        for b in range(size):
            for m in range(max_images):
                present = m < len(images[b])
                k = max(1, round(images[b][m] * keep[stage])) if present else 0
                assert counts[b, m] == k
                assert centres[b, m] == (max(1, round(0.1 * k)) if k >= 2 else 0)
                assert centres[b, m] < counts[b, m] or k == 0  # a protected token is no centre
        for name, extent in (
            (f"keep_slots_{stage}", max(1, counts.max())),
            (f"recycle_slots_{stage}", max(1, centres.max())),
            (f"out_slots_{stage}", plan.entries[layer].max()),
        ):
            np.testing.assert_array_equal(plan.inputs[name], np.arange(extent))
    assert plan.inputs["query_count"].tolist() == [min(64, max(1, n)) for n in tail]
    np.testing.assert_array_equal(plan.inputs["query_slots"], np.arange(min(64, max(1, *tail))))


def test_plan_without_reductions() -> None:
    plan = plan_prefill((), (), 2, [5, 7], [[4], []], [2, 0])
    assert plan.entries.tolist() == [[9, 7], [9, 7]]
    assert plan.maps == ()
    assert set(plan.inputs) == {"query_count", "query_slots"}


def test_ratios_and_reductions_must_pair() -> None:
    with pytest.raises(ValueError, match="zip"):
        plan_prefill(THREE, [0.5], 6, [5], [[4]], [2])
