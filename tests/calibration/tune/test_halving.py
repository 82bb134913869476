"""Successive halving finds about what asking everybody everything would find, for a fifth."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm.calibration.tune.candidates import FULL, Candidate
from lvlm.calibration.tune.halving import FIRST, MIN_CANDIDATES, left, rounds
from lvlm.calibration.tune.losses import Loss, compared


def named(count: int) -> list[Candidate]:
    return [Candidate("divprune", "none", keep=(i + 1) / (count + 1)) for i in range(count)]


def loss(part: float, margin: float = 0.01) -> Loss:
    return Loss(100, 1 - part, part, margin)


@given(st.integers(1, 200), st.integers(1, 400), st.integers(1, 9))
def test_rounds(candidates: int, samples: int, batch: int) -> None:
    plan = rounds(candidates, samples, batch)
    counts, parts = zip(*plan, strict=True)
    assert counts[-1] == samples
    assert counts[0] >= min(FIRST, samples)
    assert list(counts) == sorted(set(counts))
    assert all(count % batch == 0 for count in counts[:-1])
    assert parts[0] == candidates
    assert all(b >= min(MIN_CANDIDATES, a) for a, b in pairwise(parts))


def test_what_it_costs() -> None:
    """Of 51 candidates on 320 samples, in answers."""
    plan = rounds(51, 320, 1)
    asked, before = 0, 0
    for count, some in plan:
        asked += (count - before) * some
        before = count
    assert asked <= 0.2 * 51 * 320


PLACES = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.2, 0.5]), st.sampled_from([1.0, 2.0, 3.0, 5.0])),
    min_size=1,
    max_size=20,
)


@given(PLACES, st.integers(2, 25), st.sampled_from([None, 0.15]))
def test_the_full_model_stays_and_none_goes_for_a_worse_one(
    places: list[tuple[float, float]], most: int, max_loss: float | None
) -> None:
    some = [FULL, *named(len(places))]
    losses = dict(zip(some, [loss(0.0), *(loss(part, 1.0) for part, _ in places)], strict=True))
    speed = dict(zip(some, [1.0, *(x for _, x in places)], strict=True))
    stay = left(some, losses, speed, max_loss, most)
    assert FULL in stay
    assert len(stay) == min(most, len(some))
    for gone in set(some) - set(stay):
        for one in set(stay) - {FULL}:
            better = losses[gone].part <= losses[one].part and speed[gone] >= speed[one]
            same = losses[gone].part == losses[one].part and speed[gone] == speed[one]
            assert same or not better


def test_beyond_doubt() -> None:
    some = [FULL, *named(3)]
    losses = dict(zip(some, [loss(0), loss(0.2, 0.05), loss(0.2, 0.19), loss(0.01)], strict=True))
    speed = dict.fromkeys(some, 1.0)
    assert left(some, losses, speed, 0.02, 9) == [FULL, some[2], some[3]]
    assert left(some, losses, speed, None, 9) == some


def test_without_a_limit_the_least_loss_stays() -> None:
    some = [FULL, *named(3)]
    losses = dict(zip(some, [loss(0), loss(0.2), loss(0.1), loss(0.1)], strict=True))
    speed = dict(zip(some, [1.0, 9.0, 2.0, 3.0], strict=True))
    assert left(some, losses, speed, None, 2) == [FULL, some[3]]


@pytest.mark.parametrize("limit", [0.02, 0.05])
def test_its_choice_is_about_that_of_an_exhaustive_search(limit: float) -> None:
    """Worlds of 45 candidates on 320 samples: the faster, the more of the answers is lost, and by
    chance more or less. The choice is the fastest of those within the limit on all samples."""
    regrets = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        some = named(44)
        shortened = rng.random(44)
        speed = {
            one: 1 + 3 * x + 0.2 * rng.random() for one, x in zip(some, shortened, strict=True)
        }
        speed[FULL] = 1.0
        full = (rng.random(320) < 0.9).astype(float)
        answers = {FULL: full}
        for one, x in zip(some, shortened, strict=True):
            lost = 0.5 * x**3 * (0.5 + rng.random())
            answers[one] = full * (rng.random(320) >= lost)

        def on(count: int, answers: dict[Candidate, np.ndarray] = answers) -> dict[Candidate, Loss]:
            reference = answers[FULL][:count].tolist()
            return {one: compared(reference, own[:count].tolist()) for one, own in answers.items()}

        running = [FULL, *some]
        plan = rounds(len(running), 320, 1)
        for (count, _), (_, following) in zip(plan, [*plan[1:], plan[-1]], strict=True):
            losses = on(count)
            running = left(running, losses, speed, limit, following)
        everything = on(320)
        best, chosen = (
            max(speed[one] for one in group if everything[one].part <= limit)
            for group in ([FULL, *some], running)
        )
        regrets.append(1 - chosen / best)
    assert np.mean(regrets) < 0.05  # the fastest on all samples has had luck, too
    assert np.mean(np.array(regrets) <= 0.01) > 0.5
