"""Which image tokens go on: by every rule, and shared out over the runs of an image."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lvlm.runtime.reductions import rules
from lvlm.runtime.reductions.token_choice import TokenChoice, shared_out

FEATURES = arrays(
    np.float32,
    st.tuples(st.integers(1, 30), st.integers(1, 8)),
    elements=st.floats(-4, 4, width=32),
)


@pytest.mark.parametrize("name", sorted(rules()))
@settings(max_examples=examples(60), deadline=None)
@given(features=FEATURES, data=st.data())
def test_as_many_as_asked_for(name: str, features: np.ndarray, data: st.DataObject) -> None:
    """In rising order, each once; even where all are alike, or nothing."""
    count = data.draw(st.integers(1, len(features)))
    scores = np.concatenate([features[:, :1], features], axis=1)
    if rules()[name].temporal:
        scores = features[::-1]  # another frame
    found, made = rules()[name].reduce(features, scores, count)
    assert made.shape == (count, features.shape[1])
    assert len(found) == count
    assert (np.diff(found) > 0).all()
    assert 0 <= found.min() <= found.max() < len(features)


@settings(max_examples=examples(60), deadline=None)
@given(features=FEATURES, data=st.data())
def test_divprune_keeps_what_is_unlike(features: np.ndarray, data: st.DataObject) -> None:
    """The least distance between two that stay is not below what a greedy choice can promise: half
    of the largest least distance that any choice has, up to rounding."""
    features = features[np.abs(features).sum(1) > 0.1]
    if len(features) < 3:
        return
    count = data.draw(st.integers(2, min(4, len(features))))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    angle = np.arccos(np.clip(unit @ unit.T, -1, 1))  # a metric, in the order of the distance

    def least(chosen: np.ndarray) -> float:
        inner = angle[np.ix_(chosen, chosen)][np.triu_indices(len(chosen), 1)]
        return float(inner.min())

    best = max(least(np.array(c)) for c in combinations(range(len(features)), count))
    # The first one is not free, which costs as much again
    assert least(rules()["divprune"].choose(features, count)) >= best / 2 - 0.01


def test_divprune_by_hand() -> None:
    """Two bundles and a loner: the loner first, then one of each."""
    degrees = np.deg2rad([0, 1, 2, 90, 91, 200])
    features = np.stack([np.cos(degrees), np.sin(degrees)], 1).astype(np.float32)
    rule = rules()["divprune"]
    assert rule.choose(features, 1).tolist() == [5]
    assert rule.choose(features, 2).tolist() == [2, 5]  # 162 degrees away
    assert rule.choose(5 * features, 3).tolist() == [2, 4, 5]  # 89 from the nearest


def test_strided_by_hand() -> None:
    rule, features = rules()["strided"], np.zeros((9, 2), np.float32)
    assert rule.choose(features, 3).tolist() == [1, 4, 7]
    assert rule.choose(features, 1).tolist() == [4]
    assert rule.choose(features, 9).tolist() == list(range(9))


def test_visionzip_by_hand() -> None:
    """Three stay, two are targets, and what is most like these comes to them."""
    features = np.arange(16, dtype=np.float32).reshape(8, 2)
    paid = [9, 0, 8, 0, 0, 7, 0, 0]
    keys = [[1, 0], [2, 0], [1, 0], [0, 3], [5, 1], [1, 0], [1, 4], [9, 0]]
    scores = np.array([[p, *k] for p, k in zip(paid, keys, strict=True)], np.float32)
    found, made = rules()["visionzip"].reduce(features, scores, 5, merged=0.4)
    # Of the others, 1, 3, 4, 6 and 7, every second is a target: 1 takes 7, 4 takes none, 3 and 6 go
    assert found.tolist() == [0, 1, 2, 4, 5]
    assert made[[0, 2, 4]].tolist() == features[[0, 2, 5]].tolist()
    assert made[1].tolist() == (features[1] + features[7]).tolist()
    assert made[3].tolist() == (features[4] + features[[3, 6]].mean(0)).tolist()
    none, same = rules()["visionzip"].reduce(features, scores, 3, merged=0.0)
    assert none.tolist() == [0, 2, 5]
    assert same.tolist() == features[none].tolist()


def test_evs_by_hand() -> None:
    """What points elsewhere than before goes on, however long it is; of two alike the first."""
    before = np.array([[1, 0], [0, 1], [1, 0], [2, 2], [0, 1]], np.float32)
    now = np.array([[3, 0], [1, 0], [1, 1], [1, 1], [1, 0]], np.float32)
    rule = rules()["evs"]
    assert rule.reduce(now, before, 1)[0].tolist() == [1]
    found, made = rule.reduce(now, before, 3)
    assert found.tolist() == [1, 2, 4]
    assert made.tolist() == now[[1, 2, 4]].tolist()


def test_evs_shares_a_clip_out() -> None:
    rule: Any = rules()["evs"]
    still, little, much = (np.full((2, 2), x, np.float32) for x in (0.0, 0.1, 0.4))
    assert rule.shared([still], [9], 3) == (9,)  # an image is no video
    assert rule.shared([still, still, still], [9, 9, 9], 9) == (9, 1, 1)
    assert rule.shared([still, still, still], [9, 9, 9], 17) == (9, 4, 4)
    assert rule.shared([still, little, much], [9, 9, 9], 15) == (9, 2, 4)  # 1 + 1, 1 + 3
    assert rule.shared([still, still, much], [9, 9, 9], 15) == (9, 1, 5)
    assert rule.shared([still, still, much], [9, 9, 9], 21) == (9, 3, 9)  # no more change to see
    assert rule.shared([still, little, much], [9, 9, 9], 27) == (9, 9, 9)


@settings(max_examples=examples(100), deadline=None)
@given(data=st.data())
def test_evs_shares_are_what_was_asked_for(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 8))
    tokens = data.draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    total = data.draw(st.integers(1, sum(tokens)))
    level = data.draw(st.lists(st.sampled_from([0, 0.25, 3]), min_size=count, max_size=count))
    rule: Any = rules()["evs"]
    found = rule.shared([np.full(2, x, np.float32) for x in level], tokens, total)
    assert found[0] == tokens[0]
    assert all(1 <= one <= most for one, most in zip(found, tokens, strict=True))
    assert sum(found) == max(total, tokens[0] + count - 1)


def test_random_depends_on_its_seed() -> None:
    rule, features = rules()["random"], np.zeros((50, 2), np.float32)
    first = rule.choose(features, 20).tolist()
    assert (
        first
        == rule.choose(features + 1, 20).tolist()
        == rule.choose(features, 20, seed=0).tolist()
    )
    assert first != rule.choose(features, 20, seed=1).tolist()


@settings(max_examples=examples(200), deadline=None)
@given(runs=st.lists(st.integers(1, 90), min_size=1, max_size=9), data=st.data())
def test_tokens_are_shared_out(runs: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, sum(runs)))
    shares = shared_out(tuple(runs), count)
    assert sum(shares) == count
    for run, share in zip(runs, shares, strict=True):
        assert 0 <= share <= run
        assert abs(share - run * count / sum(runs)) <= 1


def test_each_run_for_itself() -> None:
    features = np.zeros((10, 2), np.float32)
    choice = TokenChoice("strided", {}, (4, 6), (2, 1))
    assert choice.reduce(features)[0].tolist() == [1, 3, 7]
    assert TokenChoice("strided", {}, (4, 6), (4, 0)).reduce(features)[0].tolist() == [0, 1, 2, 3]
