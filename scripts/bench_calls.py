"""Time of Model's calls: one prompt, four of different lengths, a long one; as a table's row.

    python scripts/bench_calls.py bundle/ --long 2000 --rounds 5

Prefill is the time to the first token with the images' features, the whole that of 33 tokens for
each prompt; calls to ``generate``, the best of some rounds. Peak is the process's. ``--cpu`` takes
the processor's time instead of the clock's: on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import lvlm

TOKENS = 33  # new ones; the first is prefill's


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--long", type=int, default=1000, help="letters of the long prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="processor time")
    args = parser.parse_args()
    with lvlm.load(args.bundle, device=args.device, threads=args.threads) as model:
        clock = time.process_time if args.cpu else time.perf_counter
        asked = calls(args).items()
        found: dict[str, Any] = {n: measure(model, call, args.rounds, clock) for n, call in asked}
    found["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps(found))


def calls(args: argparse.Namespace) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Prompts and their images."""
    image = np.random.default_rng(0).integers(0, 255, (336, 336, 3)).astype(np.uint8)
    letters = "abcdefghij" * (args.long // 10)
    return {
        "one": (["What is in it?"], [[image]]),
        "four": (
            ["What is in it?", "Why?", letters[: args.long // 4], "What is to be seen here?"],
            [[image], [], [image], []],
        ),
        "long": ([letters], [[image]]),
    }


def measure(
    model: lvlm.Model,
    call: tuple[Sequence[str], Sequence[list[Any]]],
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, float]:
    """Milliseconds."""
    prompts, images = list(call[0]), list(call[1])
    times: dict[str, list[float]] = {"prefill ms": [], "whole ms": []}
    for _ in range(rounds + 1):
        for taken, new in zip(times.values(), (1, TOKENS), strict=True):
            began = clock()
            model.generate(prompts, images, max_new_tokens=new, ignore_eos=True)
            taken.append((clock() - began) * 1e3)
    return {name: min(taken[1:]) for name, taken in times.items()}  # the first round warms up


if __name__ == "__main__":
    main()
