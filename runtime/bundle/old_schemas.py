"""Manifests of earlier schemas, brought to the present one while they are read.

3   has neither ``generation`` nor hashes of blocks; fields without which a manifest is complete
4   has ``compression``, a cache policy as one flat record (``FlatCompression``), and other names
    of some fields of ``images``
5   has no graph ``extend``, which a bundle may lack
6   has no ``encoder``
7   has none of ``as_text``, ``bidirectional``, ``patches`` and ``patch_heads`` in ``images``
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lvlm.core.errors import BundleError, ParameterError
from lvlm.core.typed_json import decode
from lvlm.runtime.policies.evictions import FixedPoint, Interval, ReleasedFixedPoint
from lvlm.runtime.policies.policy import Budget, CachePolicy, Decode
from lvlm.runtime.policies.scores import AllQueries, Window
from lvlm.runtime.policies.selections import Evict, Merge, ReleasedMerge, Select
from lvlm.runtime.policies.shares import (
    Profile,
    ProfileRow,
    ReleasedProfile,
    ReleasedUniform,
    Uniform,
)

FLAT = (3, 4)
OLD = (*FLAT, 5, 6, 7)
# Fields of ``images`` and their names since schema 5
IMAGES = {"apart": "independent_units", "deep": "deepstack_layers", "most": "max_dims"}


@dataclass(frozen=True)
class FlatCompression:
    """A cache policy up to schema 4.

    ``distance`` None: compaction at intervals; ``interval`` None: elimination one by one;
    ``profile`` (): all layers alike; ``queries`` 0: scored by all prompt queries.
    """

    keep: float
    profile: tuple[ProfileRow, ...]
    cap: int | None
    floor: int
    sinks: int
    recent: int
    distance: int | None
    interval: int | None
    queries: int
    positions: Literal["true", "layer0"]
    semantics: Literal["paper", "reference"]


def upgraded(data: Any, where: str) -> Any:
    """A manifest (from JSON) as the present schema has it. Raises BundleError."""
    if data["schema"] not in FLAT:
        return data
    data = dict(data)
    if isinstance(images := data.get("images"), Mapping):
        data["images"] = {IMAGES.get(key, key): value for key, value in images.items()}
    if "compression" in data:
        flat = data.pop("compression")
        data["cache_policy"] = None if flat is None else _upgraded_policy(data, flat, where)
    return data


def _upgraded_policy(data: Mapping[str, Any], flat: Any, where: str) -> dict[str, Any]:
    where = f"{where}.compression"
    parameters = data.get("parameters")
    kv = parameters.get("kv") if isinstance(parameters, Mapping) else None
    merges = "elastic-cache" in (data.get("recipe"), kv)  # the record does not say
    try:
        policy = _policy(decode(FlatCompression, flat, where), merges)
    except ParameterError as error:
        raise BundleError(f"{where}: {error}; export the bundle again") from None
    return dataclasses.asdict(policy)


def _policy(flat: FlatCompression, merges: bool) -> CachePolicy:
    if (flat.distance is None) == (flat.interval is None):
        raise ParameterError("it needs either distance or interval")
    released = flat.semantics == "reference"
    budget: Budget
    if flat.profile:
        profile = ReleasedProfile if released else Profile
        budget = profile(flat.keep, flat.cap, flat.profile)
    else:
        budget = (ReleasedUniform if released else Uniform)(flat.keep, flat.cap)
    ending: Decode
    if flat.interval is not None:
        ending = Interval(flat.interval, flat.floor)
    else:
        assert flat.distance is not None
        if flat.floor:
            raise ParameterError("floor goes with an interval")
        ending = (ReleasedFixedPoint if released else FixedPoint)(flat.distance)
    select: Select = Evict()
    if merges:
        select = ReleasedMerge() if released else Merge()
    return CachePolicy(
        score=Window(flat.queries) if flat.queries else AllQueries(),
        select=select,
        decode=ending,
        budget=budget,
        sinks=flat.sinks,
        recent=flat.recent,
        positions=flat.positions,
    )
