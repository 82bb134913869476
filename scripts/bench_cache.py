"""Decode speed and memory with compressed caches, beside the full cache and transformers.

    python scripts/bench_cache.py --work /tmp/bench

The model of bench_prefill.py; prompts of 608 and 2,000 tokens (one image of 576), 512 new tokens.
Each decode row runs in a process of its own, so that its peak memory is its own. "full, 0.2 as
long" is recipe none on a prompt, and an answer, a fifth as long: what a cache of 20 % could reach
at best. The prefill rows run in turn, round by round, in one process; so do, step by step, each
compressed cache and the full one as long: what a machine does meanwhile meets both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_prefill import make_bundle
from make_checkpoint import make_model
from random_prompt import random_prompt

import lvlm
from lvlm.export.recipes.elastic_cache import ElasticCache
from lvlm.export.recipes.lightvlm import LightVLM
from lvlm.export.recipes.none import NoCompression
from lvlm.export.recipes.prefixkv import PrefixKV
from lvlm.runtime.prompt.prompts import Prompt

RECIPES = {r.name: r for r in (NoCompression(), ElasticCache(), PrefixKV(), LightVLM(keep=1.0))}
# name of the row: recipe (None: transformers), call options, share of prompt and answer
ROWS: dict[str, tuple[str | None, dict[str, Any], float]] = {
    "transformers": (None, {}, 1.0),
    "none": ("none", {}, 1.0),
    "full, 0.2 as long": ("none", {}, 0.2),
    "full, 0.5 as long": ("none", {}, 0.5),
    **{
        f"{name} keep {keep}": (name, {"kv_keep": keep}, 1.0)
        for name in ("elastic-cache", "prefixkv", "lightvlm")
        for keep in (0.2, 0.5)
    },
    "lightvlm merged to 0.35, keep 0.5": ("lightvlm", {"keep": 0.35, "kv_keep": 0.5}, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where checkpoint and bundles go")
    parser.add_argument("--prompts", type=int, nargs="+", default=[608, 2000])
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(decode_row(args.work, args.one, args.prompts[0], args.new)))
        return
    make_model(args.work / "checkpoint")
    for recipe in RECIPES.values():
        make_bundle(args.work, recipe, f"cache-{recipe.name}")
    for length in args.prompts:
        prefill_table(args.work, length, args.rounds)
        decode_table(args.work, length, args.new)
        paired_table(args.work, length, args.new)


def decode_row(work: Path, name: str, length: int, new: int) -> dict[str, Any]:
    recipe, options, share = ROWS[name]
    length, new = round(length * share), round(new * share)
    before = memory("VmRSS")
    if recipe is None:
        steps, cache = transformers_steps(work, random_prompt(length, new), new)
        exact = None
    else:
        with lvlm.load(work / f"cache-{recipe}", verify="none") as model:
            batch = model.calls.start([random_prompt(length, new)], **options)
            steps = []
            for _ in range(new - 1):
                chosen = batch.logits.argmax(1).tolist()
                began = time.perf_counter()
                batch.feed(chosen)
                steps.append(time.perf_counter() - began)
            text, held = model.manifest.text, batch.cache
            entry = 2 * text.kv_heads * text.head_dim * 4
            ring = (held.budgets.cache_policy.queries if held.budgets.cache_policy else 0) * (
                text.layers * text.heads * text.head_dim * 4
            )
            cache = sum(b.nbytes for b in held.buffers.values())
            exact = cache == int(held.capacities.sum()) * entry + ring
    return {
        "ms": 1e3 * statistics.median(steps),
        "mean": 1e3 * statistics.mean(steps),
        "p95": 1e3 * sorted(steps)[int(0.95 * len(steps))],
        "cache": cache,
        "exact": exact,
        "peak": memory("VmHWM") - before,
    }


def transformers_steps(work: Path, prompt: Prompt, new: int) -> tuple[list[float], int]:
    from transformers import DynamicCache

    _, model = make_model(work / "checkpoint")
    cache, steps = DynamicCache(config=model.config.get_text_config()), []
    ids = torch.tensor([list(prompt.ids)])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        if prompt.images:
            features = model.get_image_features(
                torch.from_numpy(prompt.images[0].arrays["pixel_values"])
            ).pooler_output
            embeds[0, 5:581] = features[0]
        out = model(inputs_embeds=embeds, past_key_values=cache, logits_to_keep=1)
        for _ in range(new - 1):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            began = time.perf_counter()
            out = model(input_ids=token, past_key_values=cache)
            steps.append(time.perf_counter() - began)
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return steps, sum(x.numel() * x.element_size() for x in tensors)


def memory(which: str) -> int:
    """Bytes: VmRSS, resident now; VmHWM, the most so far. (ru_maxrss counts the parent's, too.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(which)).split()[1])


def decode_table(work: Path, length: int, new: int) -> None:
    found = {}
    for name in ROWS:
        command = [sys.executable, __file__, "--work", str(work), "--one", name]
        command += ["--prompts", str(length), "--new", str(new)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"  {name}: {found[name]}", file=sys.stderr, flush=True)
    full = found["none"]
    print(f"\ndecode, prompt {length}, {new} new tokens\n")
    print("| | tokens/s | ms a token, median | p95 | cache allocated | of none | peak memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, row in found.items():
        print(
            f"| {name} | {1e3 / row['mean']:.1f} | {row['ms']:.1f} | {row['p95']:.1f} "
            f"| {row['cache'] / 1e6:.1f} MB | {row['cache'] / full['cache']:.0%} "
            f"| {row['peak'] / 1e6:.0f} MB |"
        )
    exact = all(row["exact"] is not False for row in found.values())
    print(f"\nbuffers are exactly the capacities times the bytes of an entry: {exact}", flush=True)


class DecodeStream:
    """Decode steps of one row of ROWS without end: the answer begins anew when it is over."""

    def __init__(self, model: lvlm.Model, name: str, length: int, new: int) -> None:
        _, self.options, share = ROWS[name]
        self.model, self.length, self.new = model, round(length * share), round(new * share)
        self.steps: list[float] = []
        self.left = 0

    def step(self) -> None:
        if not self.left:
            prompt = random_prompt(self.length, self.new)
            self.batch = self.model.calls.start([prompt], **self.options)
            self.left = self.new - 1
        chosen = self.batch.logits.argmax(1).tolist()
        began = time.perf_counter()
        self.batch.feed(chosen)
        self.steps.append(time.perf_counter() - began)
        self.left -= 1


def paired_table(work: Path, length: int, new: int) -> None:
    """A token's time at keep 0.2 beside the full cache's, 0.2 as long, in turn."""
    print(f"\ndecode, prompt {length}, keep 0.2, steps in turn with the full cache 0.2 as long\n")
    print("| | ms a token, median | full, 0.2 as long | more |")
    print("| --- | --- | --- | --- |")
    for recipe in ("elastic-cache", "prefixkv", "lightvlm"):
        with (
            lvlm.load(work / f"cache-{recipe}", verify="none") as compressed,
            lvlm.load(work / "cache-none", verify="none") as full,
        ):
            pair = (
                DecodeStream(compressed, f"{recipe} keep 0.2", length, new),
                DecodeStream(full, "full, 0.2 as long", length, new),
            )
            for _ in range(new - 1):
                for stream in pair:
                    stream.step()
        ours, best = (1e3 * statistics.median(stream.steps) for stream in pair)
        print(f"| {recipe} | {ours:.1f} | {best:.1f} | {ours / best - 1:+.1%} |", flush=True)


def prefill_table(work: Path, length: int, rounds: int) -> None:
    models = {name: lvlm.load(work / f"cache-{name}", verify="none") for name in RECIPES}
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            options: dict[str, Any] = {"kv_keep": 0.2} if name != "none" else {}
            batch = model.calls.start([random_prompt(length, 1)], **options)
            if number:  # the first round warms up
                times[name].append(batch.running[0].prefill_ms)
    full = statistics.median(times["none"])
    print(f"\nprefill, prompt {length}, keep 0.2\n")
    print("| | median ms | min-max | more than none |")
    print("| --- | --- | --- | --- |")
    for name, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values):.0f}-{max(values):.0f}"
        print(f"| {name} | {median:.0f} | {spread} | {median / full - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
