"""The simulation of a fleet: against closed forms, by hand, and what holds of every run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm.bench.costs import Costs, EngineShape, MeasuredCosts, ReadCost, StepCost
from lvlm.bench.fleet.arrivals import Arrival, Lengths, PoissonArrivals
from lvlm.bench.fleet.fleet_outcome import LatencyTarget, figures, search
from lvlm.bench.fleet.service_times import ServiceTimes
from lvlm.bench.fleet.simulation import ROUTES, Fleet, Ran, simulate
from lvlm.core.errors import ParameterError
from lvlm.runtime.engine.chunks import CHUNK_STEPS, HELD_STEPS, STEPS_BETWEEN

ENGINE = EngineShape(
    slots=4, threads=1, chunked=False, shares=False, image_tokens=100, kept_images=3
)


def costs(
    *,
    read: float = 1.0,
    step: float = 0.1,
    more: float = 0.0,
    image: float | None = 0.5,
    prepare: float = 0.0,
) -> Costs:
    """Reading takes ``read`` for each 100 tokens and nothing beside, a step ``step`` and ``more``
    for each row above the first."""
    sizes = [(tokens, images) for images in (0, 1) for tokens in (100, 200, 1000)]
    reads = tuple(ReadCost(t, 0, images, read * t / 100) for t, images in sizes)
    steps = tuple(StepCost(rows, 100, step + more * (rows - 1)) for rows in (1, 2, 4, 8))
    return Costs(reads, steps, image, prepare)


def fleet(replicas: int = 1, *, beside: Costs | None = None, **changes: object) -> Fleet:
    """Of engines with ``changes`` from ENGINE; two share a machine where ``beside`` is given."""
    own = {name: changes.pop(name) for name in ("queue_limit", "route") if name in changes}
    alone = changes.pop("alone", costs())
    engine = replace(ENGINE, **changes)  # type: ignore[arg-type]
    copies = 1 if beside is None else 2
    measured = MeasuredCosts("one", engine, copies, alone, beside)  # type: ignore[arg-type]
    return Fleet(measured, replicas, copies, **own)  # type: ignore[arg-type]


def chance(rate: float, requests: int, **changes: object) -> PoissonArrivals:
    fixed = PoissonArrivals(
        rate, requests, Lengths(100, 100), Lengths(1, 1), images=0, distinct_images=0
    )
    return replace(fixed, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_mean_wait_is_that_of_a_queue_with_constant_service(load: float) -> None:
    """M/D/1, by Pollaczek and Khinchin: load * service / (2 (1 - load))."""
    ran = simulate(
        fleet(slots=1, queue_limit=10_000), chance(load, 10_000).arrivals(seed=2)
    )  # one second each
    waits = [job.tokens[0] - job.asked.seconds - 1.0 for job in ran.jobs]
    assert min(waits) > -1e-9
    assert statistics.mean(waits) == pytest.approx(load / (2 * (1 - load)), rel=0.1)
    assert figures(ran).utilisation == pytest.approx(load, rel=0.03)


def test_whoever_has_fewest_is_as_good_as_turns_and_better_where_answers_differ() -> None:
    """With constant service turns are one queue of two servers, which waits less than two queues
    with half the load each."""
    waits = {}
    for new in (Lengths(1, 1), Lengths(1, 30)):
        arrivals = chance(1.4 if new.high == 1 else 0.5, 4000, new_tokens=new).arrivals(seed=3)
        for route in ("round-robin", "least-requests"):
            ran = simulate(fleet(2, slots=1, queue_limit=10_000, route=route), arrivals)
            took = [job.tokens[0] - job.asked.seconds - 1.0 for job in ran.jobs]
            waits[new.high, route] = statistics.mean(took)
    assert waits[1, "least-requests"] == pytest.approx(waits[1, "round-robin"])
    assert waits[1, "round-robin"] < 0.7 / (2 * 0.3)
    assert waits[30, "least-requests"] < waits[30, "round-robin"]


def test_a_lone_request_by_hand() -> None:
    """Preparing, an image, 150 tokens, three steps."""
    alone = costs(prepare=0.25)
    (job,) = simulate(fleet(alone=alone), [Arrival(1.0, 50, 4, 1, "a")]).jobs
    assert job.tokens == pytest.approx([3.25, 3.35, 3.45, 3.55])


def test_a_second_request_joins_between_two_steps() -> None:
    """After the three steps that are owed its prompt is one gap of the first one's; then both have
    steps of two rows."""
    arrivals = [Arrival(0.0, 100, 5), Arrival(1.15, 100, 2)]
    first, second = simulate(fleet(alone=costs(more=0.05)), arrivals).jobs
    assert first.tokens == pytest.approx([1.0, 1.1, 1.2, 1.3, 2.45])
    assert second.tokens == pytest.approx([2.3, 2.45])


def test_slots_and_queue() -> None:
    """Of five at once, one runs, one waits, three are refused; preparing counts as waiting."""
    arrivals = [Arrival(0.0, 100, 1), *(Arrival(0.5, 100, 1) for _ in range(4))]
    ran = simulate(fleet(slots=1, queue_limit=1), arrivals)
    assert [job.refused for job in ran.jobs] == [False, False, True, True, True]
    assert [job.tokens for job in ran.jobs[:2]] == [[1.0], [2.0]]
    prepared = simulate(fleet(slots=1, queue_limit=1, alone=costs(prepare=0.1)), arrivals)
    assert sum(job.refused for job in prepared.jobs) == 3
    assert figures(ran).refused == 3


def test_neighbours_slow_one_another_while_both_work() -> None:
    """A works alone for half of its second, then at half the pace until B is done, too."""
    two = fleet(2, beside=costs(read=2.0))
    first, second = simulate(two, [Arrival(0.0, 100, 1), Arrival(0.5, 100, 1)]).jobs
    assert first.tokens == pytest.approx([1.5])
    assert second.tokens == pytest.approx([2.0])  # half a second beside A is a quarter of it…
    apart = replace(two, per_machine=1)
    assert [j.tokens for j in simulate(apart, [Arrival(0.0, 100, 1)] * 2).jobs] == [[1.0], [1.0]]
    with pytest.raises(ParameterError, match="--copies 2"):
        replace(fleet(), per_machine=2)


def test_what_prepares_a_request_takes_the_cores_of_those_that_run() -> None:
    first, _ = simulate(
        fleet(alone=costs(prepare=0.2)), [Arrival(0.0, 100, 1), Arrival(0.5, 100, 1)]
    ).jobs
    assert first.tokens == pytest.approx([1.4])


def test_a_long_prompt_beside_a_stream_is_read_in_chunks() -> None:
    """Pieces as long as twenty steps, at most three steps between them."""
    arrivals = [Arrival(0.0, 100, 200), Arrival(1.5, 4000, 1)]
    reads = tuple(ReadCost(t, b, 0, t / 100) for t, b in ((100, 0), (900, 0), (100, 500)))
    chunked = replace(costs(step=0.05), reads=reads)
    stream, long = simulate(fleet(chunked=True, alone=chunked), arrivals).jobs
    gaps = [b - a for a, b in pairwise(stream.tokens)]
    assert max(gaps) <= (CHUNK_STEPS + 1) * 0.05 + 1e-6
    during = [gap for a, gap in zip(stream.tokens, gaps, strict=False) if 3 < a < long.tokens[0]]
    held = [number for number, gap in enumerate(during) if gap > 0.5]
    assert len(held) > 30
    assert {b - a for a, b in pairwise(held)} == {STEPS_BETWEEN}
    whole, _ = simulate(fleet(alone=costs(step=0.05)), arrivals).jobs
    assert max(b - a for a, b in pairwise(whole.tokens)) > 40


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("streams", [1, 6])
def test_prompts_in_slices_make_short_gaps_while_others_wait(chunked: bool, streams: int) -> None:
    """A step after each slice while others wait, three after longer ones when nobody does."""
    arrivals = [*[Arrival(0.0, 100, 800)] * streams, *[Arrival(12.0, 400, 1)] * 3]
    reads = tuple(ReadCost(t, b, 0, t / 100) for t, b in ((100, 0), (900, 0), (100, 500)))
    asked = fleet(
        chunked=chunked, sliced=True, slots=8, alone=replace(costs(step=0.05), reads=reads)
    )
    jobs = simulate(asked, arrivals).jobs
    stream, others = jobs[streams - 1], jobs[streams:]
    gaps = list(zip(stream.tokens[1:], [b - a for a, b in pairwise(stream.tokens)], strict=True))
    second = others[1].tokens[0]
    queued = [gap for end, gap in gaps if 12.1 < end < second]
    longest = (min(CHUNK_STEPS, HELD_STEPS / streams) + 1) * 0.05
    short = [gap for gap in queued if gap != pytest.approx(longest, rel=0.02)]
    assert len(queued) > 7 / longest  # 8 s are read
    assert len(short) <= 3  # its beginning, ends of prompts
    assert max(short, default=0.0) < longest
    last = [gap for end, gap in gaps if second + 0.1 < end < others[2].tokens[0]]
    assert {round(gap, 2) for gap in last} == {0.05, round((CHUNK_STEPS + 1) * 0.05, 3)}
    # All of it was read, and no more
    worked = sum(gap - 0.05 for end, gap in gaps if 12 < end < others[2].tokens[0] + 0.1)
    assert worked == pytest.approx(12.0, abs=0.1)


def test_a_prompt_goes_on_where_its_slices_ended() -> None:
    """When the last of those that run ends in the middle of it, none of it is read again."""
    reads = tuple(ReadCost(t, 0, 0, t / 100) for t in (100, 400))
    asked = fleet(sliced=True, alone=replace(costs(step=0.05), reads=reads))
    stream, long = simulate(asked, [Arrival(0.0, 100, 18), Arrival(1.6, 400, 1)]).jobs
    assert stream.tokens[-1] < long.tokens[0]  # it ended meanwhile
    steps = sum(token > 1.65 for token in stream.tokens)
    assert steps > 3
    assert long.tokens[0] == pytest.approx(1.65 + 4.0 + steps * 0.05, abs=0.06)


def test_the_same_image_again() -> None:
    """Features are kept by every engine, prompts behind them only where these may be shared."""
    arrivals = [Arrival(10.0 * n, 20, 2, 1, "same") for n in range(3)]
    ran = simulate(fleet(), arrivals)
    assert [job.known for job in ran.jobs] == [False, True, True]
    assert [job.reused for job in ran.jobs] == [0, 0, 0]
    reads = (ReadCost(100, 0, 1, 1.0), ReadCost(500, 0, 1, 5.0))
    chunked = replace(costs(), reads=reads)
    shared = simulate(fleet(chunked=True, shares=True, alone=chunked), arrivals)
    assert [job.reused for job in shared.jobs] == [0, 100, 100]
    firsts = [job.tokens[0] - job.asked.seconds for job in shared.jobs]
    assert firsts == pytest.approx([1.7, 0.2, 0.2])
    # Rows and features are given up for others in turn
    others = [Arrival(100.0 + 10 * n, 20, 2, 1, f"{n}") for n in range(4)]
    again = simulate(
        fleet(chunked=True, shares=True, alone=chunked),
        [*arrivals, *others, replace(arrivals[0], seconds=200.0)],
    )
    assert (again.jobs[-1].known, again.jobs[-1].reused) == (False, 0)


@pytest.mark.parametrize(("slots", "reused"), [(2, 0), (3, 100)])
def test_a_row_before_the_last_is_kept_where_another_is_free(slots: int, reused: int) -> None:
    """Else the last running request takes it."""
    shapes = [(0.0, 12, "a"), (0.0, 120, "b"), (9.0, 2, "a")]
    asked = [Arrival(at, 20, new, 1, image) for at, new, image in shapes]
    reads = (ReadCost(100, 0, 1, 1.0), ReadCost(500, 0, 1, 5.0))
    chunked = replace(costs(), reads=reads)
    ran = simulate(fleet(slots=slots, chunked=True, shares=True, alone=chunked), asked)
    first, second, _ = (job.tokens for job in ran.jobs)
    assert second[0] < first[-1] < 9.0 < second[-1]
    assert ran.jobs[2].reused == reused
    assert ran.jobs[2].known


def test_images_find_their_replica() -> None:
    arrivals = chance(0.5, 400, images=1, distinct_images=8).arrivals(seed=1)
    known = {
        route: figures(simulate(fleet(4, route=route), arrivals)).known_images for route in ROUTES
    }
    assert known["image"] > 0.8 > 0.5 > known["round-robin"]
    mixed = [replace(each, images=0, image=None) for each in arrivals]
    assert len({job.replica for job in simulate(fleet(4, route="image"), mixed).jobs}) == 4


def test_more_replicas_answer_sooner() -> None:
    arrivals = chance(3.0, 1500, new_tokens=Lengths(1, 20)).arrivals(seed=4)
    several = [figures(simulate(fleet(n, queue_limit=2000), arrivals)) for n in (1, 2, 4, 8)]
    for less, more in pairwise(several):
        assert (more.ttft_p95 or 0) <= (less.ttft_p95 or 0)
        assert (more.e2e_p95 or 0) <= (less.e2e_p95 or 0)
        assert more.utilisation <= less.utilisation
    refused = [figures(simulate(fleet(n, queue_limit=9), arrivals)).refused for n in (1, 2, 4, 8)]
    assert refused == sorted(refused, reverse=True)
    assert refused[0] > 0 == refused[-1]


def test_the_fewest_that_hold_a_target() -> None:
    arrivals = chance(3.0, 600).arrivals(seed=5)
    one, target = fleet(queue_limit=1000), LatencyTarget(ttft=2.0)
    outcomes, fewest = search(one, arrivals, target, max_replicas=20)
    assert fewest is not None
    held = {each.replicas: target.held(each) for each in outcomes}
    assert held[fewest]
    assert not held[fewest - 1]
    assert (
        search(one, arrivals, LatencyTarget(ttft=0.5), max_replicas=6)[1] is None
    )  # reading takes a second
    assert search(one, arrivals, LatencyTarget(e2e=1000.0), max_replicas=1)[1] == 1
    full = replace(fleet(), queue_limit=1)
    _, more = search(full, arrivals, LatencyTarget(ttft=100.0), max_replicas=20)
    assert more is not None  # nothing may be refused
    assert figures(simulate(replace(full, replicas=more - 1), arrivals)).refused > 0


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        st.floats(0, 30),
        st.integers(1, 900),
        st.integers(1, 12),
        st.just(1),
        st.sampled_from(["a", "b", "c", "d"]),
    )
    | st.builds(Arrival, st.floats(0, 30), st.integers(1, 900), st.integers(1, 12)),
    min_size=1,
    max_size=25,
).map(lambda found: sorted(found, key=lambda each: each.seconds))


@given(
    arrivals=ARRIVALS,
    replicas=st.integers(1, 4),
    slots=st.integers(1, 6),
    queue_limit=st.integers(1, 6),
    chunked=st.booleans(),
    sliced=st.booleans(),
    route=st.sampled_from(list(ROUTES)),
    paired=st.booleans(),
    prepare=st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=examples(60))
def test_what_holds_of_every_run(
    arrivals: list[Arrival],
    replicas: int,
    slots: int,
    queue_limit: int,
    chunked: bool,
    sliced: bool,
    route: str,
    paired: bool,
    prepare: float,
) -> None:
    asked = fleet(
        replicas,
        slots=slots,
        queue_limit=queue_limit,
        chunked=chunked,
        sliced=sliced,
        shares=chunked,
        route=route,
        alone=costs(prepare=prepare, more=0.02),
        beside=costs(prepare=prepare, more=0.02, read=1.7, step=0.15) if paired else None,
    )
    ran = simulate(asked, arrivals)
    assert simulate(asked, arrivals).busy == ran.busy  # the same again
    for job in ran.jobs:
        assert job.refused or job.done
        assert job.refused == (not job.tokens)
        times = [job.asked.seconds, *job.tokens]
        assert times == sorted(times)
    ends = [job.tokens[-1] for job in ran.jobs if not job.refused]
    for number in range(replicas):
        own = [job for job in ran.jobs if job.replica == number and not job.refused]
        firsts = [job.tokens[0] for job in own]
        assert firsts == sorted(firsts)  # first come, first served
        assert most_at_once(own) <= slots
        assert ran.busy[number] <= max(ends) + 1e-6
    assert sum(job.refused for job in ran.jobs) <= max(0, len(arrivals) - queue_limit)
    check_figures(ran)


def most_at_once(jobs: Sequence[object]) -> int:
    """Answers that run at the same time, from their first token to the last."""
    changes = sorted(
        change
        for job in jobs
        for change in ((job.tokens[0], 1), (job.tokens[-1], -1))  # type: ignore[attr-defined]
    )
    running, most = 0, 0
    for _, change in changes:  # of those at one time the ends come first
        running += change
        most = max(most, running)
    return most


def check_figures(ran: Ran) -> None:
    found = figures(ran)
    assert found.requests == len(ran.jobs) >= found.refused
    assert (found.ttft_p50 or 0) <= (found.ttft_p95 or 0) <= (found.e2e_p95 or 0)
    assert -1e-9 <= found.utilisation <= 1 + 1e-9
    assert 0 <= found.reused <= found.known_images <= 1


def test_times_between_those_that_were_measured() -> None:
    law = [(64, 0), (200, 0), (1500, 0), (50, 600), (300, 300)]

    def took(tokens: int, behind: int) -> float:
        starts = range(behind, behind + tokens, 512)
        parts = [(min(512, behind + tokens - start), start) for start in starts]
        return sum(0.02 + 0.003 * t + 1e-6 * t * (b + t / 2) for t, b in parts)

    reads = tuple(ReadCost(t, b, 0, took(t, b)) for t, b in law)
    steps = tuple(
        StepCost(rows, tokens, 0.03 + 0.01 * rows + 1e-5 * tokens)
        for rows in (1, 2, 4)
        for tokens in (100, 600)
    )
    times = ServiceTimes(replace(ENGINE, chunked=True), Costs(reads, steps, None, 0.0))
    assert times.chunk(128, 256) == pytest.approx(took(128, 256))
    assert times.step(1, 100) == pytest.approx(0.041)
    assert times.step(3, 350) == pytest.approx(0.0635)
    assert times.step(2, 1100) == pytest.approx(0.061)  # beyond, as between the last two
    assert times.step(2, 10) == times.step(2, 100)
    assert times.image(0) == 0.0
    with pytest.raises(ParameterError, match="--images 1"):
        times.image(1)
    with pytest.raises(ParameterError, match="--slots 5"):
        times.step(5, 100)
    whole = ServiceTimes(ENGINE, costs())
    assert whole.whole(150, 0) == pytest.approx(1.5)
    with pytest.raises(ParameterError, match="measure them with --images 2"):
        whole.whole(150, 2)
    alone = ServiceTimes(replace(ENGINE, chunked=True), Costs(reads[:1], steps, None, 0.0))
    assert alone.chunk(32, 0) == pytest.approx(took(64, 0) / 2)
    one = ServiceTimes(ENGINE, Costs(reads[:1], steps, None, 0.0))
    assert one.whole(32, 0) == one.whole(64, 0) == one.whole(128, 0) / 2
