"""Pieces of a prompt behind what is there already, with the CPU kernels and without, in turn.

    python scripts/make_checkpoint.py --shape 135m -o checkpoint
    lvlm-export -m checkpoint -r none --max-text-len 4608 --dtype fp32 --no-validate -o none
    lvlm-build cpu
    python scripts/bench_extend.py none --behind 608 --threads 1

CPU milliseconds of all threads, medians, with the smallest and the largest; beside them the piece's
share of the prefill of the longest piece and all before it. Arithmetic counts the multiply-adds of
the blocks' products and of attention; the last token's head is in every one. The ratio is to that
share, below 128 tokens to a decode step if that is longer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
from measure_gap import WORD

import lvlm
from lvlm.runtime.backends.ort.kernels.kernel_library import KERNELS, OFF, find_kernels

PREFILL, STEP = "prefill", "step"
LONG = 128  # from there on a decode step excuses nothing


class KernelRuns:
    """A loaded model, and what each thing took, in ms."""

    def __init__(self, args: argparse.Namespace, kernels: str) -> None:
        with patch.dict(os.environ, {KERNELS: kernels} if kernels else {}):
            self.model = lvlm.load(args.bundle, threads=args.threads, verify="none")
        graphs, behind, whole = (
            self.model.calls.graphs,
            args.behind,
            args.behind + max(args.lengths),
        )
        options = lvlm.GenerationOptions(max_new_tokens=8, chat_template=False, ignore_eos=True)
        prompt = self.model.prepare(0, WORD * whole, (), options)
        prompt = replace(
            prompt,
            ids=prompt.ids[:whole],
            image_id=prompt.image_id[:whole],
            positions=prompt.positions[..., :whole],
        )
        none = np.zeros((0, self.model.manifest.feature_width), np.float32)
        batch = self.model.calls.start([prompt])
        call = graphs.bind("extend", batch.cache.views(slice(0, 1)))
        self.runs: dict[str | int, Callable[[], object]] = {
            n: partial(graphs.extend, prompt, range(behind, behind + n), none, call)
            for n in args.lengths
        }
        self.runs[PREFILL] = partial(self.model.calls.start, [prompt])
        self.runs[STEP] = partial(batch.feed, [5])
        self.times: dict[str | int, list[float]] = {name: [] for name in self.runs}

    def measure(self, what: str | int, record: bool) -> None:
        began = time.process_time()
        self.runs[what]()
        if record:
            self.times[what].append(1e3 * (time.process_time() - began))

    def median(self, what: str | int) -> float:
        return statistics.median(self.times[what])

    def work(self, tokens: int, behind: int) -> int:
        """Multiply-adds."""
        manifest = self.model.manifest
        text, names = manifest.text, manifest.graphs["extend"].weights
        products = sum(
            int(np.prod(weight.dims))
            for name, weight in manifest.weights.items()
            if name in names and len(weight.dims) == 2 and text.vocab not in weight.dims
        )
        each = 2 * text.layers * text.heads * text.head_dim  # of a query and a key
        return tokens * products + each * (tokens * behind + tokens * (tokens + 1) // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("bundle", type=Path, help="folder made by lvlm-export, recipe none")
    add("--behind", type=int, default=608, help="tokens before a piece")
    add("--lengths", type=int, nargs="*", default=[32, 64, 128], help="of pieces")
    add("--rounds", type=int, default=5)
    add("--threads", type=int)
    args = parser.parse_args()
    if (found := find_kernels()).path is None:
        sys.exit(f"there are no CPU kernels: {found.why}; {found.mend}")
    ways = {"no": KernelRuns(args, OFF), "yes": KernelRuns(args, os.environ.get(KERNELS, ""))}
    for number in range(args.rounds + 1):  # 0 warms up
        for what in ways["no"].runs:
            for way in ways.values():
                way.measure(what, record=number > 0)
    print(f"kernels for {found.instructions}; {args.rounds} rounds in turn, load {os.getloadavg()}")
    print("| behind | tokens | kernels | CPU ms | share | step | ratio |")
    print("| --: | --: | --- | --: | --: | --: | --: |")
    for n in args.lengths:
        for name, way in ways.items():
            whole = way.work(args.behind + max(args.lengths), 0)
            share = way.median(PREFILL) * way.work(n, args.behind) / whole
            step, times = way.median(STEP), way.times[n]
            ratio = way.median(n) / (share if n >= LONG else max(share, step))
            spread = f"{way.median(n):.1f} ({min(times):.1f}-{max(times):.1f})"
            print(
                f"| {args.behind} | {n} | {name} | {spread} | {share:.1f} | {step:.1f} "
                f"| {ratio:.2f} |"
            )


if __name__ == "__main__":
    main()
