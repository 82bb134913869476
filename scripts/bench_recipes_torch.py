"""Costs and savings of the recipes on a GPU, without TensorRT: LLaVA-1.5-7B's language model with
random fp16 weights, prefill and decode as CUDA graphs, the lvlm ops as their Triton kernels.

    python scripts/bench_recipes_torch.py
    python scripts/bench_recipes_torch.py --shape tiny --device cpu     # TRITON_INTERPRET=1

Each row is printed when it is measured. Prefill: the prompt, of which one image's tokens are a
part, to the first logits, every layer's cache filled. Decode: a step over caches as full as they
become in an answer of that length, argmax included; where a recipe compacts at intervals, its share
of a step is added. Attention is torch's scaled_dot_product_attention in all rows; the row
"transformers" is the same model in its own code, eager, as its users run it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from gpu_recipes import ALL_SLOTS, SHAPES, MeasuredRecipe, ModelSizes, engine_like, make_model
from transformers import DynamicCache

from lvlm.export.leaves import ATTENTION
from lvlm.export.recipes.elastic_cache import ElasticCache
from lvlm.export.recipes.lightvlm import LightVLM
from lvlm.export.recipes.none import NoCompression
from lvlm.export.recipes.prefixkv import PrefixKV
from lvlm.export.recipes.recipe import Recipe
from lvlm.export.recipes.uniform import UniformRecipe
from lvlm.runtime.policies.shares import ProfileRow

SHARE = 0.2
# prompts at once, tokens of each; and new ones
PREFILL = {"llava-7b": [(b, n) for n in (624, 1024, 2624) for b in (1, 8, 16)], "tiny": [(1, 64)]}
DECODE = {
    "llava-7b": [
        (b, n, new) for n, new in ((624, 256), (1024, 512), (2624, 512)) for b in (1, 16, 48)
    ],
    "tiny": [(1, 64, 8)],
}
PEER_STEPS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llava-7b")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of each call")
    parser.add_argument("--recipes", nargs="+", choices=rows(4), default=list(rows(4)))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --shape tiny goes through without one")
    shape, device = SHAPES[args.shape], torch.device(args.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = make_model(shape, device, dtype)
    say(
        f"{device_name(device)}; {shape.name}'s language model, {shape.layers} layers, "
        f"{shape.image_tokens} image tokens a prompt, {dtype}, random weights; "
        f"medians of {args.repeats} runs.\n"
    )
    for part in args.parts:
        PARTS[part](model, shape, args)


def rows(layers: int) -> dict[str, Recipe]:
    """The recipes by the name of their row. PrefixKV's profile is made up: shares that fall
    linearly from the first layer to the last, 1.6 to 0.4 times the mean."""
    shares = tuple(float(x) for x in SHARE * np.linspace(1.6, 0.4, layers))
    profile = (ProfileRow(SHARE, shares),)
    return {
        "none": NoCompression(),
        "lightvlm 35 %": LightVLM(keep=0.35),
        "lightvlm 15 %": LightVLM(keep=0.15),
        "lightvlm 3 %": LightVLM(keep=0.03),
        "elastic-cache 0.2": ElasticCache(kv_keep=SHARE),
        "prefixkv 0.2": PrefixKV(kv_keep=SHARE, rows=profile),
        "uniform 0.2": UniformRecipe(kv_keep=SHARE),
    }


def check(model: Any, shape: ModelSizes, args: argparse.Namespace) -> None:
    """Prefill's logits on kernels beside the same module's on the ops' torch references."""
    say("## Logits of prefill beside those of the ops' torch references\n")
    say("| recipe | largest difference, of the largest logit | same token |\n| --- | --- | --- |")
    for name, measured in chosen(model, shape, args, 2, shape.image_tokens + 48):
        call = measured.prefill()
        with engine_like(model, ATTENTION):
            ours = call()
        model.config._attn_implementation = ATTENTION
        with torch.no_grad():
            right = call()
        worst = float((ours - right).abs().max() / right.abs().max())
        same = int((ours.argmax(-1) == right.argmax(-1)).sum())
        say(f"| {name} | {worst:.1e} | {same} of {len(right)} |")
    say("")


def prefill(model: Any, shape: ModelSizes, args: argparse.Namespace) -> None:
    say("## Prefill\n\n| prompts | tokens | recipe | ms | of none | tokens/s |")
    say("| --- | --- | --- | --- | --- | --- |")
    for batch, prompt in PREFILL[args.shape]:
        plain: float | None = None
        for name, measured in chosen(model, shape, args, batch, prompt):
            ms = attempt(prefill_ms, model, measured, args)
            plain = ms if name == "none" and isinstance(ms, float) else plain
            tail = f"{ms} | | |"
            if isinstance(ms, float):
                tail = f"{ms:.2f} | {share(ms, plain)} | {batch * prompt / ms * 1e3:,.0f} |"
            say(f"| {batch} | {prompt:,} | {name} | {tail}")
    say("")


def decode(model: Any, shape: ModelSizes, args: argparse.Namespace) -> None:
    say("## Decode\n")
    say("| prompts | tokens + new | recipe | slots a layer | cache | ms a step | of none "
        "| tokens/s |")  # fmt: skip
    say("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for batch, prompt, new in DECODE[args.shape]:
        plain: float | None = None
        for name, measured in chosen(model, shape, args, batch, prompt):
            slots = measured.capacity(new)
            ms = attempt(step_ms, model, measured, slots, args)
            plain = ms if name == "none" and isinstance(ms, float) else plain
            head = f"| {batch} | {prompt:,} + {new} | {name} | {slots.mean():,.0f} "
            head += f"| {measured.cache_bytes(slots) / 1e9:.2f} GB "
            tail = f"| {ms} | | |"
            if isinstance(ms, float):
                tail = f"| {ms:.2f} | {share(ms, plain)} | {batch / ms * 1e3:,.0f} |"
            say(head + tail)
    say("")


def prefill_ms(model: Any, measured: MeasuredRecipe, args: argparse.Namespace) -> float:
    return timed(model, ATTENTION, measured.prefill(), args)


def step_ms(
    model: Any, measured: MeasuredRecipe, slots: np.ndarray, args: argparse.Namespace
) -> float:
    ms = timed(model, ALL_SLOTS, measured.decode(slots), args)
    compaction, rule = measured.compact(), measured.rule
    if compaction is not None and rule is not None:
        ms += timed(model, ATTENTION, compaction, args) / (rule.cache_policy.interval or 1)
    return ms


def peer(model: Any, shape: ModelSizes, args: argparse.Namespace) -> None:
    """The same model run by transformers, without graphs and kernels of ours."""
    say("## transformers, eager, sdpa\n\n| prompts | tokens | prefill ms | ms a step |")
    say("| --- | --- | --- | --- |")
    model.config._attn_implementation = "sdpa"
    sizes = [(b, n) for b, n in PREFILL[args.shape] if n != 624 and b != 8]
    for batch, prompt in sizes:
        found = attempt(peer_row, model, shape, batch, prompt, args)
        cells = found if isinstance(found, str) else " | ".join(f"{x:.2f}" for x in found)
        say(f"| {batch} | {prompt:,} | {cells} |")
    say("")


@torch.no_grad()
def peer_row(
    model: Any, shape: ModelSizes, batch: int, prompt: int, args: argparse.Namespace
) -> tuple[float, float]:
    device = model.lm_head.weight.device
    ids = torch.randint(10, shape.vocab, (batch, prompt), device=device)

    def once() -> tuple[float, float]:
        cache = DynamicCache(config=model.config)
        began = clock(device)
        out = model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        middle = clock(device)
        for _ in range(PEER_STEPS):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(input_ids=token, past_key_values=cache, logits_to_keep=1)
        return (middle - began) * 1e3, (clock(device) - middle) * 1e3 / PEER_STEPS

    once()
    runs = [once() for _ in range(args.repeats)]
    return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)


def chosen(
    model: Any, shape: ModelSizes, args: argparse.Namespace, batch: int, prompt: int
) -> Iterator[tuple[str, MeasuredRecipe]]:
    for name, recipe in rows(shape.layers).items():
        if name in args.recipes:
            yield name, MeasuredRecipe(model, shape, recipe, batch, prompt)
            if args.device == "cuda":
                torch.cuda.empty_cache()


def timed(model: Any, attention: str, call: Callable[[], Any], args: argparse.Namespace) -> float:
    """Median milliseconds: replays of a CUDA graph, or plain calls on a CPU."""
    device = model.lm_head.weight.device
    with engine_like(model, attention):
        if device.type == "cpu":
            return statistics.median(_wall(call, device) for _ in range(args.repeats))
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # compiles what is new, makes handles
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
    graph.replay()
    times = [_wall(graph.replay, device) for _ in range(args.repeats)]
    if out.dtype.is_floating_point and not bool(out.isfinite().all()):
        raise ArithmeticError("logits are not finite")
    return statistics.median(times)


def _wall(call: Callable[[], Any], device: torch.device) -> float:
    began = clock(device)
    call()
    return (clock(device) - began) * 1e3


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def attempt(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Its result, or why there is none."""
    try:
        return measure(*arguments)
    except torch.OutOfMemoryError:
        return "does not fit into memory"
    except ArithmeticError as error:
        return f"failed: {error}"


def share(ms: float, plain: float | None) -> str:
    return "" if plain is None else f"{ms / plain:.0%}"


def device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "the CPU, kernels in Triton's interpreter (times mean nothing)"
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


def say(line: str) -> None:
    print(line, flush=True)


PARTS: dict[str, Callable[[Any, ModelSizes, argparse.Namespace], None]] = {
    "check": check,
    "prefill": prefill,
    "decode": decode,
    "transformers": peer,
}

if __name__ == "__main__":
    main()
