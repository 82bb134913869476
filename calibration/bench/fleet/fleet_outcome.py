"""Figures of a simulated fleet, and the fewest replicas that hold a target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lvlm.bench.case_figures import percentile
from lvlm.bench.fleet.arrivals import Arrival
from lvlm.bench.fleet.simulation import Fleet, Ran, simulate


@dataclass(frozen=True)
class FleetOutcome:
    """Seconds, and parts of 1; times are of requests that were answered, None where none was.

    ``utilisation``: of the time from the first arrival to the last token that replicas worked.
    ``known_images``: of the requests with images those whose images were encoded before,
    ``reused``: those whose prompts were read behind the images.
    """

    replicas: int
    requests: int
    refused: int
    requests_per_s: float
    tokens_per_s: float
    ttft_p50: float | None
    ttft_p95: float | None
    itl_p95: float | None
    e2e_p50: float | None
    e2e_p95: float | None
    utilisation: float
    known_images: float
    reused: float


@dataclass(frozen=True)
class LatencyTarget:
    """Maximal seconds at p95, with no request refused; None: any."""

    ttft: float | None = None
    e2e: float | None = None

    def held(self, outcome: FleetOutcome) -> bool:
        found = ((outcome.ttft_p95, self.ttft), (outcome.e2e_p95, self.e2e))
        return not outcome.refused and all(
            limit is None or (value is not None and value <= limit) for value, limit in found
        )


def figures(ran: Ran) -> FleetOutcome:
    """Figures of all requests after a simulation."""
    answered = [job for job in ran.jobs if not job.refused]
    first = [job.tokens[0] - job.asked.seconds for job in answered]
    whole = [job.tokens[-1] - job.asked.seconds for job in answered]
    gaps = [b - a for job in answered for a, b in pairwise(job.tokens)]
    ends = max((job.tokens[-1] for job in answered), default=0.0)
    seconds = ends - min(job.asked.seconds for job in ran.jobs)
    shown = [job for job in answered if job.asked.images]
    return FleetOutcome(
        replicas=len(ran.busy),
        requests=len(ran.jobs),
        refused=len(ran.jobs) - len(answered),
        requests_per_s=_part(len(answered), seconds),
        tokens_per_s=_part(sum(len(job.tokens) for job in answered), seconds),
        ttft_p50=_percentile(first, 50),
        ttft_p95=_percentile(first, 95),
        itl_p95=_percentile(gaps, 95),
        e2e_p50=_percentile(whole, 50),
        e2e_p95=_percentile(whole, 95),
        utilisation=_part(sum(ran.busy), len(ran.busy) * seconds),
        known_images=_part(sum(job.known or job.reused > 0 for job in shown), len(shown)),
        reused=_part(sum(job.reused > 0 for job in shown), len(shown)),
    )


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return percentile(values, percent) if values else None


def _part(of: float, all_: float) -> float:
    return of / all_ if all_ > 0 else 0.0


def search(
    fleet: Fleet, arrivals: Sequence[Arrival], target: LatencyTarget, max_replicas: int
) -> tuple[list[FleetOutcome], int | None]:
    """The fewest replicas up to ``max_replicas`` that hold the target (None: not even those), and
    the outcomes that were looked at: doubled until it is held, then halved between."""
    found: dict[int, FleetOutcome] = {}

    def holds(count: int) -> bool:
        found[count] = figures(simulate(replace(fleet, replicas=count), arrivals))
        return target.held(found[count])

    fewest = _first(holds, max_replicas)
    return [found[count] for count in sorted(found)], fewest


def _first(holds: Callable[[int], bool], max_replicas: int) -> int | None:
    """The smallest number that holds, of those from 1 on; all above one that does do."""
    low = 0
    for high in _doubled(max_replicas):
        if holds(high):
            break
        low = high
    else:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _doubled(max_replicas: int) -> Iterator[int]:
    number = 1
    while number < max_replicas:
        yield number
        number *= 2
    yield max_replicas


def table(outcomes: Sequence[FleetOutcome]) -> str:
    """A Markdown table: seconds, inter-token times in milliseconds."""
    names = ["replicas", "requests/s", "tokens/s", "TTFT p50", "p95", "ITL ms p95", "answer p50"]
    names += ["p95", "refused", "busy", "images known", "prompts reused"]
    lines = [f"| {' | '.join(names)} |", f"|{' --: |' * len(names)}"]
    for each in outcomes:
        cells = [str(each.replicas), f"{each.requests_per_s:.2f}", f"{each.tokens_per_s:.1f}"]
        cells += [_shown(each.ttft_p50), _shown(each.ttft_p95)]
        cells += ["—" if each.itl_p95 is None else f"{1e3 * each.itl_p95:,.0f}"]
        cells += [_shown(each.e2e_p50), _shown(each.e2e_p95), f"{each.refused:,}"]
        cells += [f"{x:.0%}" for x in (each.utilisation, each.known_images, each.reused)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(seconds: float | None) -> str:
    return "—" if seconds is None else f"{seconds:,.2f}"
