"""What a candidate promises, by the answers that are there."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm.calibration.tune.candidates import FULL, Candidate, candidates
from lvlm.calibration.tune.promise import (
    FIRST,
    MIN_CANDIDATES,
    PART,
    THOUGHT_LOST,
    THOUGHT_OF,
    Outlook,
    budget,
    compresses_less,
    next_count,
)

ASKED = st.integers(1, 80).flatmap(
    lambda samples: st.integers(0, samples).flatmap(
        lambda asked: st.tuples(st.integers(0, asked), st.just(asked), st.just(samples))
    )
)


def naive(lost: int, asked: int, samples: int) -> list[float]:
    """Pólya's urn, drawn sample by sample: each that is lost makes the next more probable."""
    chances = [1.0]
    for drawn in range(samples - asked):
        after = [0.0] * (len(chances) + 1)
        for more, chance in enumerate(chances):
            part = (THOUGHT_OF * THOUGHT_LOST + lost + more) / (THOUGHT_OF + asked + drawn)
            after[more + 1] += chance * part
            after[more] += chance * (1 - part)
        chances = after
    return chances


@given(ASKED)
def test_chances_are_those_of_an_urn(drawn: tuple[int, int, int]) -> None:
    assert Outlook.of(*drawn).chances.tolist() == pytest.approx(naive(*drawn), abs=1e-9)


@given(ASKED, st.integers(-3, 90))
def test_what_follows_from_chances(drawn: tuple[int, int, int], limit: int) -> None:
    outlook = Outlook.of(*drawn)
    in_all = {drawn[0] + more: chance for more, chance in enumerate(naive(*drawn))}
    within = math.fsum(chance for lost, chance in in_all.items() if lost <= limit)
    fewer = math.fsum(chance * max(0, limit - lost) for lost, chance in in_all.items())
    assert outlook.at_most(limit) == pytest.approx(within, abs=1e-9)
    assert outlook.improvement(limit) == pytest.approx(fewer, abs=1e-7)


def test_parts_of_answers() -> None:
    """Scores need not be whole: what is lost so far stays as it is, the rest comes in answers."""
    assert Outlook.of(0.4, 10, 10).at_most(0.4) == 1
    assert Outlook.of(0.4, 10, 10).at_most(0.3) == 0
    assert Outlook.of(-2.5, 10, 10).improvement(0.0) == 2.5
    some = Outlook.of(0.4, 10, 20)
    assert some.at_most(1.39) == pytest.approx(some.chances[0])
    assert some.at_most(1.4) == pytest.approx(some.chances[:2].sum())


@given(st.integers(1, 400), st.integers(1, 9))
def test_counts(samples: int, batch: int) -> None:
    counts = [0]
    while counts[-1] < samples:
        counts.append(next_count(counts[-1], samples, batch))
    assert counts == sorted(set(counts))
    assert all(count % batch == 0 for count in counts[:-1])
    assert counts[1] >= min(FIRST, samples)


def test_budget() -> None:
    assert budget(100, 160) == pytest.approx(PART * 100 * 160)
    assert budget(5, 160) == MIN_CANDIDATES * 160
    assert budget(1, 160) == 160


def test_who_compresses_less() -> None:
    def one(recipe: str, kv: str | None, keep: float | None, kv_keep: float | None) -> Candidate:
        return Candidate(recipe, kv, keep, kv_keep)

    divprune = one("divprune", "none", 0.5, None)
    assert compresses_less(divprune, one("divprune", "none", 0.33, None))
    assert not compresses_less(divprune, one("divprune", "none", 0.7, None))
    assert not compresses_less(divprune, one("hybrid", "none", 0.33, None))
    assert compresses_less(divprune, one("divprune", "snapkv", 0.5, 0.2))
    assert compresses_less(one("snapkv", None, None, 0.5), one("divprune", "snapkv", 0.7, 0.5))
    assert not compresses_less(one("snapkv", None, None, 0.2), one("divprune", "snapkv", 0.7, 0.5))
    assert not compresses_less(one("tova", None, None, 0.5), one("divprune", "snapkv", 0.7, 0.5))


def test_compressing_less_is_an_order() -> None:
    some = candidates(["divprune", "lightvlm", "snapkv", "interval"], [0.7, 0.3], [0.5, 0.2])
    pairs = {(a, b) for a, b in product(some, some) if compresses_less(a, b)}
    assert pairs
    assert not any((b, a) in pairs for a, b in pairs)
    assert all((a, d) in pairs for (a, b), (c, d) in product(pairs, pairs) if b == c)
    assert not any(FULL in pair for pair in pairs)  # what it loses is known to be nothing
