"""Check of the simulated fleet: the same requests to real replicas and to simulated ones.

    lvlm-bench none/ --costs --threads 1 --copies 2 --json costs.json
    python scripts/check_fleet.py none/ costs.json --loads 0.4,0.7,0.9 --seconds 150
    python scripts/check_fleet.py tiny/ costs.json --paced

Starts as many lvlm-serve as ran at once when costs were measured, each on cores of its own with as
many threads, and sends them requests in turn, or by image, at times drawn beforehand that nothing
delays (Poisson). --loads are parts of what the simulation says the replicas can do. Answers are
streamed with logprobs, so that every token has an event. Prints
both beside one another, and how many CPUs the replicas, this client, and others took meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from measure_start import StartedServer, replica
from PIL import Image

from lvlm.bench.case_figures import percentile
from lvlm.bench.cost_rounds import parted_cores
from lvlm.bench.costs import read_costs
from lvlm.bench.fleet.arrivals import Arrival, PoissonArrivals, read_lengths
from lvlm.bench.fleet.simulation import ROUTES, Fleet, simulate
from lvlm.bench.workload import WorkloadPrompts, noise, prompt_maker
from lvlm.runtime.bundle.reader import read_bundle

ENOUGH = 300  # requests at once, to see what the replicas can do
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class TimedAnswer:
    """Seconds from a round's start; ``tokens``: when each was there."""

    arrival: float
    status: int = 0
    tokens: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("costs", type=Path, help="what lvlm-bench --costs --json wrote")
    parser.add_argument("--contender", help="which one, where the file has several")
    parser.add_argument("--loads", default="0.4,0.7,0.9", help="parts of what they can do")
    parser.add_argument("--seconds", type=float, default=150.0, help="of arrivals, for each load")
    parser.add_argument("--prompt-tokens", default="32")
    parser.add_argument("--new-tokens", default="16-64")
    parser.add_argument("--distinct-images", type=int, default=0, help="there are; 0: each its own")
    parser.add_argument("--route", choices=("round-robin", "image"), default="round-robin")
    parser.add_argument(
        "--paced",
        action="store_true",
        help="slow a small bundle down to these costs, where the machine has other work, too",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="every time of every token")
    args = parser.parse_args()
    measured = read_costs(args.costs, args.contender)
    together, program = measured.copies, ["-m", "lvlm", "serve"]
    if args.paced:  # a bundle with other images; nobody waits for memory
        tokens = read_bundle(args.bundle).images.tokens
        measured = replace(measured, engine=replace(measured.engine, image_tokens=tokens))
        script = str(Path(__file__).with_name("paced_serve.py"))
        together, program = 1, [script, str(args.costs), measured.contender]
    fleet = Fleet(measured, measured.copies, together, route=args.route)
    found: list[dict[str, Any]] = []
    with ExitStack() as running:
        engine = measured.engine
        words = ["--threads", str(engine.threads), "--slots", str(engine.slots)]
        servers = [
            running.enter_context(replica(args.bundle, words, program=program, cores=cores))
            for cores in parted_cores(engine.threads, measured.copies)
        ]
        print("| load | | requests/s | TTFT p50 s | p95 | ITL p50 ms | p95 | answer p50 s | p95 |")
        print(f"|{' --: |' * 9}", flush=True)
        can = capacity(fleet, args)
        for load in map(float, args.loads.split(",")):
            asked = drawn(args, load * can, max(2, round(load * can * args.seconds)))
            found.append(compared(args, fleet, servers, load, asked))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def drawn(args: argparse.Namespace, rate: float, requests: int) -> list[Arrival]:
    """Requests at a rate, each with an image."""
    text, new = read_lengths(args.prompt_tokens), read_lengths(args.new_tokens)
    return PoissonArrivals(rate, requests, text, new, 1, args.distinct_images).arrivals(args.seed)


def capacity(fleet: Fleet, args: argparse.Namespace) -> float:
    """Requests a second of replicas that are never idle."""
    asked = [replace(each, seconds=0.0) for each in drawn(args, 1.0, ENOUGH)]
    ran = simulate(replace(fleet, queue_limit=ENOUGH), asked)
    return ENOUGH / max(job.tokens[-1] for job in ran.jobs)


def compared(
    args: argparse.Namespace,
    fleet: Fleet,
    servers: Sequence[StartedServer],
    load: float,
    asked: Sequence[Arrival],
) -> dict[str, Any]:
    """One round of requests, real and simulated, as rows of a table."""
    before, cpu = time.perf_counter(), used(servers)
    answers = asyncio.run(ask_all(args, servers, asked))
    seconds = time.perf_counter() - before
    spent = [b - a for a, b in zip(cpu, used(servers), strict=True)]
    real = [each for each in answers if each.status == 200]
    ran = simulate(fleet, asked)
    drawn_ones = [
        TimedAnswer(job.asked.seconds, 200, job.tokens) for job in ran.jobs if not job.refused
    ]
    for name, some in (("real", real), ("simulated", drawn_ones)):
        print(f"| {load:.0%} | {name} | {' | '.join(cells(some))} |", flush=True)
    both = [f"{a / b:.2f}" for a, b in zip(values(drawn_ones), values(real), strict=True)]
    print(f"| | simulated / real | {' | '.join(both)} |", flush=True)
    shares = [part / seconds for part in spent]
    print(
        f"| | {len(asked)} requests, {len(asked) - len(real)} refused | "
        f"CPUs: replicas {shares[0]:.2f}, client {shares[1]:.3f}, others {shares[2]:.2f} "
        f"{'| ' * 6}|",
        flush=True,
    )
    return {
        "load": load,
        "cpus": dict(zip(("replicas", "client", "others"), shares, strict=True)),
        "real": [vars(each) for each in answers],
        "simulated": [vars(each) for each in drawn_ones],
    }


def values(answers: Sequence[TimedAnswer]) -> list[float]:
    """Figures of the table's columns."""
    first = [each.tokens[0] - each.arrival for each in answers]
    whole = [each.tokens[-1] - each.arrival for each in answers]
    gaps = [
        1e3 * (b - a)
        for each in answers
        for a, b in zip(each.tokens, each.tokens[1:], strict=False)
    ]
    ends = max(each.tokens[-1] for each in answers) - min(each.arrival for each in answers)
    times = [percentile(some, p) for some in (first, gaps, whole) for p in (50, 95)]
    return [len(answers) / ends, *times]


def cells(answers: Sequence[TimedAnswer]) -> list[str]:
    styles = (".3f", ".2f", ".2f", ".0f", ".0f", ".2f", ".2f")
    return [f"{value:{style}}" for value, style in zip(values(answers), styles, strict=True)]


async def ask_all(
    args: argparse.Namespace, servers: Sequence[StartedServer], asked: Sequence[Arrival]
) -> list[TimedAnswer]:
    bodies = list(written(args, asked))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
        began = time.perf_counter()

        async def one(number: int) -> TimedAnswer:
            answer = TimedAnswer(asked[number].seconds)
            await asyncio.sleep(began + answer.arrival - time.perf_counter())
            server = servers[ROUTES[args.route](servers, asked[number], number)]  # type: ignore[arg-type]
            path, headers = (
                f"{server.url}/v1/chat/completions",
                {"Content-Type": "application/json"},
            )
            body = bodies[number]
            async with client.stream("POST", path, content=body, headers=headers) as stream:
                answer.status = stream.status_code
                events = 0
                async for chunk in stream.aiter_raw():
                    new = chunk.count(b'"logprob"')
                    events += new
                    answer.tokens += [time.perf_counter() - began] * new
            if answer.status == 200 and events != asked[number].new_tokens:
                raise SystemExit(f"{events} tokens instead of {asked[number].new_tokens}")
            return answer

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(number)) for number in range(len(asked))]
    return [task.result() for task in tasks]


def written(args: argparse.Namespace, asked: Sequence[Arrival]) -> Iterator[bytes]:
    """The bodies of requests: texts that nobody asked before, images that no other round has."""
    manifest = read_bundle(args.bundle)
    maker = prompt_maker(args.bundle, manifest)
    writer = WorkloadPrompts(maker, manifest.special_tokens.get("bos_token"))
    first = time.time_ns() % 10**9  # the replicas know those of the last round
    for number, each in enumerate(asked, first):
        assert each.image is not None
        file = io.BytesIO()
        Image.fromarray(noise(first + int(each.image), writer.size)).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": writer.write(each.text_tokens, 1, number)},
        ]
        body: dict[str, Any] = {"messages": [{"role": "user", "content": parts}], "stream": True}
        body |= {"max_tokens": each.new_tokens, "ignore_eos": True, "logprobs": True}
        yield json.dumps(body).encode()


def used(servers: Sequence[StartedServer]) -> list[float]:
    """CPU seconds so far: of the replicas, of this process, of all others."""
    lines = [Path(f"/proc/{server.pid}/stat").read_text() for server in servers]
    fields = [line.rpartition(")")[2].split() for line in lines]
    replicas = sum((int(f[11]) + int(f[12])) / TICKS for f in fields)
    own = time.process_time()
    # user, nice, system of all cores; idle and waiting come after
    machine = Path("/proc/stat").read_text().splitlines()[0].split()
    busy = sum(map(int, (*machine[1:4], *machine[6:9]))) / TICKS
    return [replicas, own, busy - replicas - own]


if __name__ == "__main__":
    main()
