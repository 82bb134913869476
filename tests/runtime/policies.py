"""Cache policies for tests, changed by the flat names of their parts' fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lvlm.runtime.policies.evictions import (
    Append,
    FixedPoint,
    Interval,
    Oldest,
    OneByOne,
    ReleasedFixedPoint,
)
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.scores import Accumulated, AllQueries, Recency, Window
from lvlm.runtime.policies.selections import Evict
from lvlm.runtime.policies.shares import Profile, ReleasedProfile, ReleasedUniform, Uniform

UNIFORM = CachePolicy(AllQueries(), Evict(), FixedPoint(25), Uniform(0.2), sinks=1)
INTERVAL = CachePolicy(Window(32), Evict(), Interval(64, 128), Uniform(0.5), sinks=4, recent=32)
SLIDING = CachePolicy(Recency(), Evict(), Oldest(), Uniform(0.5), sinks=4)
APPENDED = CachePolicy(Window(2, 5), Evict(), Append(), Uniform(0.5), recent=2)

SUMMED = CachePolicy(Accumulated(), Evict(), Interval(1), Uniform(0.5), recent=2)


def changed(policy: CachePolicy, **changes: Any) -> CachePolicy:
    """With other ``keep``, ``cap``, ``profile`` (rows; (): uniform), ``semantics``, ``distance``,
    ``interval``, ``floor``, ``queries``, or fields of CachePolicy."""
    budget, decode, score = policy.budget, policy.decode, policy.score
    rows = changes.pop("profile", getattr(budget, "rows", ()))
    released = changes.pop("semantics", None)
    released = is_released(policy) if released is None else released == "reference"
    keep, cap = changes.pop("keep", budget.keep), changes.pop("cap", budget.cap)
    if rows:
        budget = (ReleasedProfile if released else Profile)(keep, cap, rows)
    else:
        budget = (ReleasedUniform if released else Uniform)(keep, cap)
    if isinstance(decode, Interval):
        steps, floor = changes.pop("interval", decode.steps), changes.pop("floor", decode.floor)
        decode = Interval(steps, floor)
        score = Window(changes.pop("queries", policy.queries))
    elif not isinstance(decode, Append | Oldest):
        distance = changes.pop("distance", decode.distance)
        decode = (ReleasedFixedPoint if released else FixedPoint)(distance)
    return replace(policy, budget=budget, decode=decode, score=score, **changes)


def is_released(policy: CachePolicy) -> bool:
    return isinstance(policy.decode, ReleasedFixedPoint)


def removed(policy: CachePolicy, kept: int) -> int:
    """Index by age of the entry that leaves, written out; ``kept`` of the prompt."""
    decode = policy.decode
    assert isinstance(decode, OneByOne)
    if isinstance(decode, Oldest):  # of whatever comes after the sinks
        return policy.sinks
    distance = decode.distance
    point = kept // 2 if kept <= distance else kept - distance
    guarded = 0 if is_released(policy) else policy.sinks  # the released code: none
    return min(max(point, guarded), kept)


def least_left(policy: CachePolicy) -> int:
    """Entries that decode leaves in any case, written out."""
    if isinstance(policy.decode, OneByOne):
        if is_released(policy):
            return 1
        return policy.sinks + 1 if isinstance(policy.decode, Oldest) else max(1, policy.sinks)
    return policy.sinks + policy.recent
