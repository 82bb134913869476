"""The papers' tables on one GPU: prefill and decode by recipe, beside transformers on the same GPU.

    python scripts/bench_gpu.py --work /big/disk --device cuda
    python scripts/bench_gpu.py --work /big/disk --device tensorrt-rtx --cases 1x1024+512 8x1024+512
    python scripts/bench_gpu.py --work /tmp/dry --device cpu --shape tiny --cases 1x160+8 2x160+8

A case is prompts at once x tokens of a prompt (one picture's among them) + new tokens. The model
has LLaVA-1.5-7B's shapes and random fp16 weights, made here; 30 GB of disk. For engines of TensorRT
the bundle's text length is that of the longest case and ``lvlm-build engine`` is run for every
recipe, so run long cases by themselves. Every row runs in a process of its own, after a warm-up;
answers end at their length. A case that does not fit into memory says so.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from bench_big_checkpoint import make_checkpoint
from random_prompt import prompt_for

import lvlm
from lvlm.runtime.bundle import Manifest, read_bundle
from lvlm.runtime.errors import LvlmError, ParameterError
from lvlm.runtime.prompts import Prompt

CASES = ("1x1024+512", "8x1024+512", "16x1024+512", "16x624+256", "48x624+256", "1x1024+4096")
# name of a row: recipe (None: transformers), settings at export, options of a call
ROWS: dict[str, tuple[str | None, tuple[str, ...], dict[str, float]]] = {
    "transformers": (None, (), {}),
    "none": ("none", (), {}),
    "lightvlm 35 %": ("lightvlm", (), {"keep": 0.35}),
    "lightvlm 15 %": ("lightvlm", (), {"keep": 0.15}),
    "lightvlm 3 %": ("lightvlm", (), {"keep": 0.03}),
    "elastic-cache 0.2": ("elastic-cache", ("kv_keep=0.2",), {"kv_keep": 0.2}),
    "prefixkv 0.2": ("prefixkv", ("kv_keep=0.2",), {}),
}
TARGETS = {"tensorrt": "trt-11", "tensorrt-rtx": "trt-rtx"}


@dataclass(frozen=True)
class Case:
    batch: int
    prompt: int
    new: int

    @classmethod
    def parse(cls, text: str) -> Case:
        found = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text)
        if not found:
            raise argparse.ArgumentTypeError(f"'{text}' is no case; write 8x1024+512")
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt}+{self.new}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where checkpoint and bundles go")
    parser.add_argument("--device", default="cuda", help="as lvlm-run takes it")
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--cases", type=Case.parse, nargs="+", default=[*map(Case.parse, CASES)])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, args.one, args.cases[0])))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint(args)
    for name in args.rows:
        if ROWS[name][0] is not None:
            make_bundle(args, name)
    print(f"device {args.device}: {device_name(args.device)}; shape {args.shape}\n")
    for case in args.cases:
        table(args, case)


def checkpoint(args: argparse.Namespace) -> Path:
    if args.shape == "tiny":
        return Path(str(resources.files("lvlm.assets") / "tiny-llava"))
    folder = Path(args.work) / "llava-1.5-7b-random"
    if not (folder / "model.safetensors.index.json").exists():
        make_checkpoint(folder, "llava-1.5-7b")
    return folder


def bundle_folder(args: argparse.Namespace, name: str) -> Path:
    recipe, settings, _ = ROWS[name]
    return Path(args.work) / "-".join((args.shape, str(recipe), *settings))


def make_bundle(args: argparse.Namespace, name: str) -> None:
    recipe, settings, _ = ROWS[name]
    folder = bundle_folder(args, name)
    words = [word for setting in settings for word in ("--set", setting)]
    longest = max(case.prompt + case.new for case in args.cases)
    dtype = "fp32" if args.shape == "tiny" else "fp16"
    if not folder.exists():
        command = ["export", "-m", str(checkpoint(args)), "-r", str(recipe), *words]
        command += ["--dtype", dtype, "--max-text-len", str(longest), "--no-validate"]
        lvlm_command(*command, "-o", str(folder))
    if target := TARGETS.get(args.device):
        most = max(case.batch for case in args.cases)
        command = ["engine", str(folder), "--target", target, "--batch", f"1..{most}", "--force"]
        lvlm_command("build", *command, "--max-prompt", str(max(c.prompt for c in args.cases)))


def lvlm_command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "lvlm", *words], check=True, stdout=sys.stderr)


def device_name(device: str) -> str:
    if device == "cpu":
        return "the CPU"
    from lvlm.runtime.nvidia import driver

    return driver().gpus[0].name


def table(args: argparse.Namespace, case: Case) -> None:
    print(f"{case.batch} prompts of {case.prompt} tokens, {case.new} new\n")
    print("| | prefill ms | of transformers | ms a step | of transformers | tokens/s | cache |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    peer: dict[str, Any] | None = None
    for name in args.rows:
        command = [sys.executable, __file__, "--work", str(args.work), "--device", args.device]
        command += ["--shape", args.shape, "--cases", str(case), "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
        if "prefill" not in found:
            reason = found.get("reason") or done.stderr.strip().splitlines()[-1]
            print(f"| {name} | not run: {reason} | | | | | |", flush=True)
            continue
        peer = found if name == "transformers" else peer
        shares = [f"{found[k] / peer[k]:.0%}" if peer else "" for k in ("prefill", "step")]
        rate = case.batch * case.new / (found["prefill"] + found["step"] * (case.new - 1)) * 1e3
        print(
            f"| {name} | {found['prefill']:.1f} | {shares[0]} | {found['step']:.2f} | {shares[1]} "
            f"| {rate:.1f} | {found['cache'] / 1e6:.0f} MB |",
            flush=True,
        )
    print()


def measure(args: argparse.Namespace, name: str, case: Case) -> dict[str, Any]:
    """Milliseconds of prefill and, on average, of a step; bytes of the cache; or the reason."""
    recipe, _, options = ROWS[name]
    try:
        if recipe is None:
            return transformers_row(args, case)
        with lvlm.load(bundle_folder(args, name), device=args.device, verify=False) as model:
            prompts = [prompt_of(model.manifest, case, row) for row in range(case.batch)]
            run_ours(model, prompts, 4, options)
            return run_ours(model, prompts, case.new, options)
    except LvlmError as error:
        return {"reason": str(error)}


def run_ours(
    model: lvlm.Model, prompts: list[Prompt], new: int, options: dict[str, float]
) -> dict[str, Any]:
    batch = model.batches.start(prompts, **options)
    began = time.perf_counter()
    for _ in range(new - 1):
        for row, logits in zip(batch.rows, batch.logits, strict=True):
            row.tokens.append(int(logits.argmax()))
        batch.decode_step()
    step = (time.perf_counter() - began) * 1e3 / max(1, new - 1)
    cache = sum(buffer.nbytes for buffer in batch.cache.buffers.values())
    return {"prefill": batch.timings.prefill_ms, "step": step, "cache": cache}


def prompt_of(manifest: Manifest, case: Case, row: int) -> Prompt:
    prompt = prompt_for(manifest, case.prompt, case.new, row)
    if not prompt.pictures:
        tokens = manifest.images.tokens
        raise ParameterError(f"a prompt of {case.prompt} has no room for {tokens} image tokens")
    return prompt


def transformers_row(args: argparse.Namespace, case: Case) -> dict[str, Any]:
    """The same prompts in transformers: fp16 and its fused attention on a GPU."""
    import torch
    from transformers import DynamicCache, LlavaForConditionalGeneration

    place = "cpu" if args.device == "cpu" else "cuda"
    dtype = torch.float32 if args.shape == "tiny" else torch.float16
    manifest = read_bundle(bundle_folder(args, "none"), verify=False)
    prompts = [prompt_of(manifest, case, row) for row in range(case.batch)]
    ids = torch.tensor([list(p.ids) for p in prompts], device=place)
    arrays = [p.pictures[0].arrays["pixel_values"] for p in prompts]
    pixels = torch.from_numpy(np.concatenate(arrays)).to(place, dtype)

    def wait() -> float:
        if place == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(new: int) -> dict[str, Any]:
        cache = DynamicCache(config=model.config.get_text_config())
        embeds = model.get_input_embeddings()(ids)
        features = model.get_image_features(pixels).pooler_output
        for row in range(case.batch):
            embeds[row, 5 : 5 + manifest.images.tokens] = features[row]
        began = wait()
        out = model(inputs_embeds=embeds, past_key_values=cache, logits_to_keep=1)
        middle = wait()
        for _ in range(new - 1):
            out = model(input_ids=out.logits[:, -1].argmax(-1, keepdim=True), past_key_values=cache)
        end = wait()
        tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        size = sum(x.numel() * x.element_size() for x in tensors)
        step = (end - middle) * 1e3 / max(1, new - 1)
        return {"prefill": (middle - began) * 1e3, "step": step, "cache": size}

    try:
        with torch.no_grad():
            model = LlavaForConditionalGeneration.from_pretrained(checkpoint(args), dtype=dtype)
            model = model.to(place).eval()
            run(4)
            return run(case.new)
    except torch.OutOfMemoryError as error:
        return {"reason": f"out of memory ({str(error).split('. ')[0]})"}


if __name__ == "__main__":
    main()
