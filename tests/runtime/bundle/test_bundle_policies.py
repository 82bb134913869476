"""Cache policies of a manifest: those that can be, and what is said of others."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from bundle_tools import FIXED_POINT, INTERVAL, PROFILE, change, fit_ports, put, refused
from policies import APPENDED, SLIDING, SUMMED, UNIFORM, changed

from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.shares import ProfileRow


@pytest.mark.parametrize(
    "cache_policy",
    [
        None,
        INTERVAL,
        changed(INTERVAL, cap=36, floor=0, interval=1, keep=1.0),
        changed(INTERVAL, sinks=0, recent=1, queries=1, cap=1),
        changed(FIXED_POINT, profile=(), distance=0, cap=2),
        changed(FIXED_POINT, sinks=0, semantics="reference", positions="layer0"),
        changed(FIXED_POINT, profile=(ProfileRow(0.2000009, (0.3, 0.3, 0.1, 0.1)),)),
        changed(FIXED_POINT, profile=(*PROFILE, ProfileRow(1.0, (1.0,) * 4))),
        SLIDING,
        APPENDED,
        SUMMED,
    ],
)
def test_cache_policies_that_can_be(folder: Path, cache_policy: CachePolicy | None) -> None:
    fit_ports(replace(read_bundle(folder), cache_policy=cache_policy)).write(folder)
    assert read_bundle(folder).cache_policy == cache_policy


@pytest.mark.parametrize(
    ("start", "where", "value", "said"),
    [
        *(
            (FIXED_POINT, "budget.keep", keep, ".budget: kv_keep is")
            for keep in (0, -0.2, 1.01, float("nan"))
        ),
        (FIXED_POINT, "budget.cap", 1, ": kv_cap is 1, but 2 entries are protected"),
        (FIXED_POINT, "budget.cap", 0, ".budget: kv_cap is 0"),
        (INTERVAL, "budget.cap", 35, ": kv_cap is 35, but 36 entries are protected"),
        (FIXED_POINT, "budget.kind", "unifrom", ".budget is of unknown kind 'unifrom'"),
        (FIXED_POINT, "budget.floor", 1, ".budget: unknown field 'floor'"),
        (INTERVAL, "decode.floor", -1, ".decode: kv_floor is -1"),
        (FIXED_POINT, "sinks", -1, ": kv_sinks is -1"),
        (FIXED_POINT, "recent", -1, ": recent entries is -1"),
        (changed(UNIFORM, sinks=0), "recent", 0, ": no entry is protected"),
        (INTERVAL, "recent", 31, ": 32 queries rank the entries, but only the last 31"),
        (FIXED_POINT, "decode.distance", -1, ".decode: distance is -1"),
        (FIXED_POINT, "decode", {"kind": "fixed-point"}, ".decode: missing field 'distance'"),
        (FIXED_POINT, "decode", {}, ".decode is of unknown kind"),
        (FIXED_POINT, "decode", None, ".decode is not an object"),
        (INTERVAL, "decode.steps", 0, ".decode: kv_interval is 0"),
        (INTERVAL, "score.queries", 0, ".score: window is 0"),
        (INTERVAL, "score.kernel", 2, ".score: kernel is 2; give an odd number"),
        (INTERVAL, "score.pool", "sum", ".score.pool holds 'sum'"),
        (INTERVAL, "score", {"kind": "recency"}, ": compaction at intervals is ranked by"),
        (SUMMED, "decode", {"kind": "append"}, ": scores that go on in decode are for entries"),
        (SUMMED, "select", {"kind": "merge"}, ": scores that go on in decode are for entries"),
        (FIXED_POINT, "decode", {"kind": "released-fixed-point", "distance": 3}, "own elimination"),
        (FIXED_POINT, "select", {"kind": ["evict"]}, ".select is of unknown kind"),
    ],
)
def test_cache_policies_that_cannot_be(
    folder: Path, start: CachePolicy, where: str, value: Any, said: str
) -> None:
    change(folder, put("cache_policy", value=asdict(start)))
    change(folder, put("cache_policy", *where.split("."), value=value))
    assert said in refused(folder)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(0.5, (0.5,) * 4), (0.2, (0.2,) * 4)], "rows are not by rising keep"),
        ([(0.5, (0.5,) * 4), (0.5, (0.5,) * 4)], "rows are not by rising keep"),
        ([], "rows are not by rising keep"),
        ([(0.5, (0.5,) * 3)], "another number of layers than 4"),
        ([(0.5, ())], "another mean"),
        ([(0.25, (0.5, 0.4, 0.1, 0.0))], "a number of the profile is 0.0"),
        ([(0.5, (1.2, 0.4, 0.3, 0.1))], "a number of the profile is 1.2"),
        ([(float("nan"), (0.5,) * 4)], "a number of the profile is nan"),
        ([(0.5, (0.5, 0.5, 0.5, float("nan")))], "a number of the profile is nan"),
        ([(-1e-7, (1e-7,) * 4)], "a number of the profile is -1e-07"),
        ([(0.5, (0.5, 0.5, 0.5, 0.50001))], "another mean"),
    ],
)
def test_profiles_that_cannot_be(
    folder: Path, rows: list[tuple[float, tuple[float, ...]]], said: str
) -> None:
    profile = [{"keep": keep, "fractions": list(fractions)} for keep, fractions in rows]
    change(folder, put("cache_policy", "budget", "rows", value=profile))
    assert said in refused(folder)
