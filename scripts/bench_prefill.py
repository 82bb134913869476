"""Prefill time with and without token merging, beside the arithmetic saved and transformers.

    python scripts/bench_prefill.py --work /tmp/bench

A model of 135 M text parameters (Llama, 576 wide, 30 layers, 9/3 heads) with random weights; one
image of 576 tokens and a short question. Everything runs in turn, round by round, in one process;
medians are printed, with the spread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import SHAPES, make_model
from random_prompt import random_prompt

import lvlm
from lvlm.core.progress import Progress
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.exporter import export, stages
from lvlm.export.recipes.lightvlm import LightVLM
from lvlm.export.recipes.none import NoCompression

KEEPS = (1.0, 0.35, 0.15, 0.03)
TEXT = SHAPES["135m"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where checkpoint and bundles go")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=608, help="tokens, 576 of them the image's")
    args = parser.parse_args()
    _, torch_model = make_model(args.work / "checkpoint")
    bundles = {
        recipe.name: make_bundle(args.work, recipe, f"bundle-{recipe.name}")
        for recipe in (NoCompression(), LightVLM(kv="none"))
    }
    prompt = random_prompt(args.prompt, 1)
    pixels = torch.from_numpy(prompt.images[0].arrays["pixel_values"])
    models = {name: lvlm.load(folder) for name, folder in bundles.items()}

    def ours(name: str, keep: float) -> Callable[[], tuple[float, list[int]]]:
        def run() -> tuple[float, list[int]]:
            (request,) = models[name].calls.start([prompt], keep=keep).running
            return request.prefill_ms, request.counts.prefill.entries[:, 0].tolist()

        return run

    def transformers() -> tuple[float, list[int]]:
        with torch.no_grad():
            features = torch_model.get_image_features(pixels).pooler_output
            embeds = torch_model.get_input_embeddings()(torch.tensor([prompt.ids]))
            embeds[0, 5:581] = features[0]
            began = time.perf_counter()
            torch_model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
            return (time.perf_counter() - began) * 1e3, [args.prompt] * 30

    rows: dict[str, Callable[[], tuple[float, list[int]]]] = {"transformers fp32": transformers}
    rows["none"] = ours("none", 1.0)
    rows |= {f"lightvlm keep {k}": ours("lightvlm", k) for k in KEEPS}
    times: dict[str, list[float]] = {name: [] for name in rows}
    lengths: dict[str, list[int]] = {}
    for number in range(args.rounds + 1):
        for name, run in rows.items():
            took, lengths[name] = run()
            if number:  # the first round warms up
                times[name].append(took)
    full = statistics.median(times["none"])
    print("| prefill of | median ms | min-max | of none | arithmetic of none |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in times.items():
        median = statistics.median(values)
        share = arithmetic(lengths[name]) / arithmetic(lengths["none"])
        print(
            f"| {name} | {median:.0f} | {min(values):.0f}-{max(values):.0f} "
            f"| {median / full:.0%} | {share:.0%} |"
        )


def arithmetic(tokens_per_layer: list[int]) -> float:
    """Multiply-adds of the blocks: weights times tokens, and causal attention."""
    width, heads, head_dim = TEXT["hidden_size"], TEXT["num_attention_heads"], TEXT["head_dim"]
    kv = TEXT["num_key_value_heads"]
    weights = width * head_dim * (2 * heads + 2 * kv) + 3 * width * TEXT["intermediate_size"]
    return float(sum(n * weights + 2 * n * n * heads * head_dim for n in tokens_per_layer))


def make_bundle(work: Path, recipe: Any, name: str) -> Path:
    output = work / name  # remove it after a change of the exporter
    if not (output / "lvlm.json").exists():
        options = ExportOptions(
            model=str(work / "checkpoint"),
            recipe=recipe,
            output=output,
            dtype="fp32",
            validate=False,
        )
        plan = make_plan(options)
        export(plan, Progress(stages(plan)))
    return output


if __name__ == "__main__":
    main()
