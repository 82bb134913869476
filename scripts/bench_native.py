"""Bundles on device cpu with the CPU kernels beside the same without them, in one run.

    python scripts/make_checkpoint.py --shape 135m -o checkpoint
    lvlm-export -m checkpoint -r none --max-text-len 4608 --dtype fp32 --no-validate -o none
    lvlm-build cpu
    python scripts/bench_native.py none elastic-cache --prompt 608,2000,4000

Each bundle is loaded twice; then the two take turns, round by round, so that other work on the
machine meets both. Prompts are random tokens and one random image. Medians, with the smallest and
the largest; CPU time beside them, which other work counts less for. Tokens must be equal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from random_prompt import prompt_for

import lvlm
from lvlm.runtime.backends.ort.kernels.kernel_library import KERNELS, OFF, find_kernels

STEPS = 8  # of decode


@dataclass
class MeasuredModel:
    """One of the two, and what it took; ``cpu``: seconds of all threads."""

    model: lvlm.Model
    load: float
    prefill: list[float] = field(default_factory=list)
    prefill_cpu: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    step_cpu: list[float] = field(default_factory=list)

    def run(self, length: int, record: bool) -> list[int]:
        """One prompt and STEPS tokens."""
        calls, prompt = self.model.calls, prompt_for(self.model.manifest, length, STEPS + 1)
        began, cpu = time.perf_counter(), time.process_time()
        with calls.run([prompt]) as batch:
            (request,) = batch.running
            batch.choose([0])
            read, read_cpu = time.perf_counter(), time.process_time()
            steps = 0
            while batch.running:
                batch.step()
                steps += 1
        ended, ended_cpu = time.perf_counter(), time.process_time()
        if record:
            self.prefill.append(read - began)
            self.prefill_cpu.append(read_cpu - cpu)
            self.step.append((ended - read) / max(1, steps))
            self.step_cpu.append((ended_cpu - read_cpu) / max(1, steps))
        return list(request.row.tokens)


def loaded(bundle: Path, kernels: str, threads: int | None) -> MeasuredModel:
    with patch.dict(os.environ, {KERNELS: kernels} if kernels else {}):
        began = time.perf_counter()
        model = lvlm.load(bundle, threads=threads)
        return MeasuredModel(model, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("bundles", type=Path, nargs="+", help="folders made by lvlm-export")
    add("--prompt", default="608,2000,4000", help="tokens in all, with commas")
    add("--rounds", type=int, default=5)
    add("--threads", type=int)
    args = parser.parse_args()
    if (found := find_kernels()).path is None:
        sys.exit(f"there are no CPU kernels: {found.why}; {found.mend}")
    print(f"kernels for {found.instructions}; {args.rounds} rounds in turn, load {os.getloadavg()}")
    print(
        "| bundle | tokens | kernels | load s | first token ms | CPU ms | next ones ms | CPU ms |"
    )
    print("| --- | --: | --- | --: | --: | --: | --: | --: |")
    for bundle in args.bundles:
        ways = {
            "no": loaded(bundle, OFF, args.threads),
            "yes": loaded(bundle, os.environ.get(KERNELS, ""), args.threads),
        }
        for length in map(int, args.prompt.split(",")):
            measure(bundle, length, ways, args.rounds)


def measure(bundle: Path, length: int, ways: dict[str, MeasuredModel], rounds: int) -> None:
    for way in ways.values():
        for times in (way.prefill, way.prefill_cpu, way.step, way.step_cpu):
            times.clear()
    for number in range(rounds + 1):
        answers = [way.run(length, record=number > 0) for way in ways.values()]  # 0 warms up
        if answers[0] != answers[1]:
            print(f"{bundle} at {length}: other tokens, {answers}", file=sys.stderr)
    for name, way in ways.items():
        cells = [shown(x) for x in (way.prefill, way.prefill_cpu, way.step, way.step_cpu)]
        print(f"| {bundle.name} | {length} | {name} | {way.load:.1f} | {' | '.join(cells)} |")


def shown(seconds: list[float]) -> str:
    values = [1000 * s for s in seconds]
    digits = 0 if max(values) > 200 else 1
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    main()
