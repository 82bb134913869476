"""lvlm-fleet: number of replicas of lvlm-serve that hold a target, by discrete-event simulation.

Each replica is an engine with the slots, queue and order of work of lvlm-serve's (docs/engine.md);
how long images, prompts and decode steps take is what lvlm-bench measured. docs/scaling.md says how
to read the table, and how far it is from a real run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lvlm.bench.costs import read_costs
from lvlm.bench.fleet.arrivals import (
    MAX_COUNT,
    Arrival,
    Lengths,
    PoissonArrivals,
    read_lengths,
    read_trace,
)
from lvlm.bench.fleet.fleet_outcome import FleetOutcome, LatencyTarget, figures, search, table
from lvlm.bench.fleet.simulation import ROUTES, Fleet, simulate
from lvlm.core.console import Parser, run_main
from lvlm.core.errors import ParameterError

NONE_HOLDS = 1  # the status if not even --max-replicas replicas hold the target


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lvlm-fleet",
        description="Simulate replicas of lvlm-serve behind a load balancer, from costs that "
        "lvlm-bench measured, and find the fewest that hold a target.",
        epilog="examples: lvlm-bench out/ --costs --threads 1 --copies 2 --json costs.json · "
        "lvlm-fleet costs.json --rate 3 --new-tokens 16-64 --target-ttft-p95 2",
    )
    add = parser.add_argument
    add("costs", type=Path, metavar="COSTS", help="what lvlm-bench --costs --json wrote")
    add("--contender", metavar="NAME", help="which one, where the file has several")
    load = parser.add_argument_group("what comes")
    add = load.add_argument
    add("--rate", type=float, metavar="R", help="requests per second, at random (Poisson)")
    add("--requests", type=int, metavar="N", help="how many (default 2000)")
    add("--prompt-tokens", metavar="N", help="of text: 64, or 16-128 for any between (default 32)")
    add("--new-tokens", metavar="N", help="of an answer, likewise (default 64)")
    add("--images", type=int, metavar="N", help="of a prompt (default 1)")
    add(
        "--distinct-images",
        type=int,
        metavar="N",
        help="of all prompts (default: its own each)",
    )
    add("--seed", type=int, metavar="N", help="of chance (default 0)")
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="requests from a file instead, a JSON object a "
        'line: {"seconds": 0.5, "text_tokens": 32, "new_tokens": 64, "images": 1, "image": "a"}',
    )
    fleet = parser.add_argument_group("the fleet")
    add = fleet.add_argument
    add("--replicas", type=int, metavar="N", help="simulate so many, instead of a search")
    add("--slots", type=int, metavar="N", help="of each (default: as many as were measured)")
    add("--queue", type=int, default=256, metavar="N", help="requests that may wait (256)")
    add("--route", choices=[*ROUTES], default="round-robin", help="whom a request is sent to")
    add(
        "--per-machine",
        type=int,
        metavar="N",
        help="replicas that share a machine, each with "
        "cores of its own (default: as many as ran at once when costs were measured)",
    )
    wanted = parser.add_argument_group("the target")
    add = wanted.add_argument
    add("--target-ttft-p95", type=float, metavar="S", help="seconds to the first token")
    add("--target-e2e-p95", type=float, metavar="S", help="seconds to the last token")
    add("--max-replicas", type=int, default=64, metavar="N", help="replicas to try (64)")
    add("--json", action="store_true", help="print figures as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_main("lvlm-fleet", lambda: _run(make_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    target = _target(args)
    arrivals = _arrivals(args)
    measured = read_costs(args.costs, args.contender)
    if args.slots is not None:
        measured = replace(measured, engine=replace(measured.engine, slots=args.slots))
    per_machine = args.per_machine or measured.copies
    if per_machine > measured.copies:
        raise ParameterError(
            f"--per-machine {per_machine}: costs were measured with {measured.copies} at once; "
            f"measure them with --copies {per_machine}"
        )
    fleet = Fleet(measured, args.replicas or 1, per_machine, args.queue, args.route)
    if target is None:
        outcomes, fewest = [figures(simulate(fleet, arrivals))], None
    else:
        outcomes, fewest = search(fleet, arrivals, target, args.max_replicas)
    _show(args, outcomes, target, fewest)
    return NONE_HOLDS if target is not None and fewest is None else 0


def _show(
    args: argparse.Namespace,
    outcomes: Sequence[FleetOutcome],
    target: LatencyTarget | None,
    fewest: int | None,
) -> None:
    if args.json:
        data = {"outcomes": [asdict(each) for each in outcomes], "fewest": fewest}
        print(json.dumps(data, indent=1))
        return
    print(table(outcomes))
    if target is None:
        return
    if fewest is None:
        print(f"\nNot even {args.max_replicas} replicas hold the target.", file=sys.stderr)
    else:
        print(f"\n{fewest} replica{'s hold' if fewest > 1 else ' holds'} the target.")


def _target(args: argparse.Namespace) -> LatencyTarget | None:
    """None: so many --replicas are simulated."""
    minimums = {
        "requests": 1,
        "images": 0,
        "distinct_images": 1,
        "replicas": 1,
        "slots": 1,
        "queue": 1,
    }
    minimums |= {"per_machine": 1, "max_replicas": 1, "seed": 0}
    for name, low in minimums.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= MAX_COUNT:
            raise ParameterError(
                f"--{name.replace('_', '-')} is {value}; give {low} to {MAX_COUNT:,}"
            )
    for name in ("rate", "target_ttft_p95", "target_e2e_p95"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ParameterError(f"--{name.replace('_', '-')} is {value}; give one above 0")
    target = LatencyTarget(args.target_ttft_p95, args.target_e2e_p95)
    asked = target != LatencyTarget()
    if asked == (args.replicas is not None):
        raise ParameterError(
            "give either --replicas, to see what they do, or --target-ttft-p95 or "
            "--target-e2e-p95, to see how many hold it"
        )
    return target if asked else None


def _arrivals(args: argparse.Namespace) -> list[Arrival]:
    drawn = ("rate", "requests", "prompt_tokens", "new_tokens", "images", "distinct_images", "seed")
    if (args.rate is None) == (args.trace is None):
        raise ParameterError("what comes? give either --rate or --trace")
    if args.trace is not None:
        for name in drawn:
            if getattr(args, name) is not None:
                raise ParameterError(
                    f"--{name.replace('_', '-')} has no effect beside --trace; leave it out"
                )
        return read_trace(args.trace)
    images = 1 if args.images is None else args.images
    if args.distinct_images and not images:
        raise ParameterError("--distinct-images has no effect without images; leave it out")
    chance = PoissonArrivals(
        rate=args.rate,
        requests=args.requests or 2000,
        text_tokens=_lengths("--prompt-tokens", args.prompt_tokens or "32"),
        new_tokens=_lengths("--new-tokens", args.new_tokens or "64"),
        images=images,
        distinct_images=args.distinct_images or 0,
    )
    return chance.arrivals(args.seed or 0)


def _lengths(flag: str, text: str) -> Lengths:
    try:
        return read_lengths(text)
    except ValueError:
        raise ParameterError(f"{flag} {text}: write a number, or two as 16-128") from None
