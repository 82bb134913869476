"""The papers' tables on one GPU: prefill and decode by recipe, beside transformers on the same GPU.

    python scripts/bench_gpu.py --work /big/disk --device cuda
    python scripts/bench_gpu.py --work /big/disk --device tensorrt-rtx --cases 1x1024+512 8x1024+512
    python scripts/bench_gpu.py --work /tmp/dry --device cpu --shape tiny --cases 1x160+8 2x160+8

A case is prompts at once x tokens of a prompt (one image's among them) + new tokens. The model
has LLaVA-1.5-7B's shapes and random fp16 weights, made here. One recipe after the other: exported,
measured in all cases by one process, and removed, so that disk for the checkpoint and one bundle
(28 GB, 42 with engines) is enough. For engines of TensorRT the bundle's text length is that of the
longest case, so run long cases by themselves. Each figure is printed when it is there, the tables
at the end; answers end at their length. A case that does not fit into memory says so.

Without ONNX Runtime or TensorRT on the GPU: bench_recipes_torch.py.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from random_prompt import BEFORE, prompt_for, random_prompt

import lvlm
from lvlm.core.errors import LvlmError, ParameterError
from lvlm.runtime.backends import open_backend
from lvlm.runtime.prompt.prompts import Prompt

CASES = ("1x1024+512", "8x1024+512", "16x1024+512", "16x624+256", "48x624+256", "1x1024+4096")
# name of a row: recipe (None: transformers), settings at export, options of a call
ROWS: dict[str, tuple[str | None, tuple[str, ...], dict[str, Any]]] = {
    "transformers": (None, (), {}),
    "none": ("none", (), {}),
    "lightvlm 35 %": ("lightvlm", (), {"keep": 0.35}),
    "lightvlm 15 %": ("lightvlm", (), {"keep": 0.15}),
    "lightvlm 3 %": ("lightvlm", (), {"keep": 0.03}),
    "elastic-cache 0.2": ("elastic-cache", ("kv_keep=0.2",), {"kv_keep": 0.2}),
    "prefixkv 0.2": ("prefixkv", ("kv_keep=0.2",), {}),
}
TARGETS = {"tensorrt": "trt-11", "tensorrt-rtx": "trt-rtx"}
DISK = {"7b": 14_200_000_000, "tiny": 30_000_000}  # bytes of a checkpoint, a bundle or engines
Figures = dict[str, Any]  # of a row in a case, or the reason why there are none


@dataclass(frozen=True)
class DecodeCase:
    batch: int
    prompt: int
    new: int

    @classmethod
    def parse(cls, text: str) -> DecodeCase:
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
    parser.add_argument("--shape", choices=DISK, default="7b")
    parser.add_argument(
        "--cases", type=DecodeCase.parse, nargs="+", default=[*map(DecodeCase.parse, CASES)]
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        for case in args.cases:
            print(json.dumps(measure(args, args.one, case)), flush=True)
        return
    check_machine(args)
    checkpoint(args)
    print(f"device {args.device}: {device_name(args.device)}; shape {args.shape}\n", flush=True)
    found: dict[str, list[Figures]] = {}
    for name in args.rows:
        make_bundle(args, name)
        found[name] = all_cases(args, name)
        shutil.rmtree(bundle_folder(args, name), ignore_errors=True)
    for number, case in enumerate(args.cases):
        table(case, {name: figures[number] for name, figures in found.items()})


def check_machine(args: argparse.Namespace) -> None:
    """Ends with one line where the device's runtime is not there or the disk is too small, before
    anything large is made."""
    if {row for row in args.rows if ROWS[row][0] is not None}:
        try:
            open_backend(args.device)
        except LvlmError as error:
            sys.exit(str(error))
    args.work.mkdir(parents=True, exist_ok=True)
    needed = DISK[args.shape] * (3 if args.device in TARGETS else 2)
    have = sum(f.stat().st_size for f in args.work.rglob("*") if f.is_file())
    free = shutil.disk_usage(args.work).free + have
    if free < needed:
        sys.exit(
            f"{args.work} has room for {free / 1e9:.0f} GB, {needed / 1e9:.0f} GB are needed; "
            "give a --work on a larger disk"
        )


def all_cases(args: argparse.Namespace, name: str) -> list[Figures]:
    """Every case's figures, from one process; what follows a crash says what it said."""
    command = [sys.executable, __file__, "--work", str(args.work), "--device", args.device]
    command += ["--shape", args.shape, "--one", name, "--cases", *map(str, args.cases)]
    figures: list[Figures] = []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                figures.append(json.loads(line))
                print(f"{args.cases[len(figures) - 1]} {name}: {line}", end="", flush=True)
        process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines() or [f"ended with {process.returncode}"]
    missing = len(args.cases) - len(figures)
    return figures + [{"reason": said[-1]}] * missing


def checkpoint(args: argparse.Namespace) -> Path:
    if args.shape == "tiny":
        return Path(str(resources.files("lvlm.assets") / "tiny-llava"))
    folder = Path(args.work) / "llava-1.5-7b-random"
    if not (folder / "model.safetensors.index.json").exists():
        from bench_big_checkpoint import make_checkpoint  # imports torch

        make_checkpoint(folder, "llava-1.5-7b")
    return folder


def bundle_folder(args: argparse.Namespace, name: str) -> Path:
    recipe, settings, _ = ROWS[name]
    return Path(args.work) / "-".join((args.shape, str(recipe), *settings))


def make_bundle(args: argparse.Namespace, name: str) -> None:
    recipe, settings, _ = ROWS[name]
    if recipe is None:
        return
    folder = bundle_folder(args, name)
    words = [word for setting in settings for word in ("--set", setting)]
    longest = max(case.prompt + case.new for case in args.cases)
    dtype = "fp32" if args.shape == "tiny" else "fp16"
    if not folder.exists():
        command = ["export", "-m", str(checkpoint(args)), "-r", recipe, *words]
        command += ["--dtype", dtype, "--max-text-len", str(longest), "--no-validate"]
        lvlm_command(*command, "-o", str(folder))
    if target := TARGETS.get(args.device):
        max_batch = max(case.batch for case in args.cases)
        command = ["engine", str(folder), "--target", target, "--batch", f"1..{max_batch}"]
        lvlm_command(
            "build", *command, "--force", "--max-prompt", str(max(c.prompt for c in args.cases))
        )


def lvlm_command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "lvlm", *words], check=True, stdout=sys.stderr)


def device_name(device: str) -> str:
    if device == "cpu":
        return "the CPU"
    from lvlm.core.nvidia import driver

    return driver().gpus[0].name


def table(case: DecodeCase, found: dict[str, Figures]) -> None:
    print(f"\n{case.batch} prompts of {case.prompt} tokens, {case.new} new\n")
    print("| | prefill ms | of transformers | ms a step | of transformers | tokens/s | cache |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    peer = found.get("transformers", {})
    for name, figures in found.items():
        if "prefill" not in figures:
            print(f"| {name} | not run: {figures['reason']} | | | | | |")
            continue
        keys = ("prefill", "step")
        shares = [f"{figures[k] / peer[k]:.0%}" if k in peer else "" for k in keys]
        seconds = (figures["prefill"] + figures["step"] * (case.new - 1)) / 1e3
        print(
            f"| {name} | {figures['prefill']:.1f} | {shares[0]} | {figures['step']:.2f} "
            f"| {shares[1]} | {case.batch * case.new / seconds:.1f} "
            f"| {figures['cache'] / 1e6:.0f} MB |"
        )


def measure(args: argparse.Namespace, name: str, case: DecodeCase) -> Figures:
    """Milliseconds of prefill and, on average, of a step; bytes of the cache; or the reason."""
    recipe, _, options = ROWS[name]
    try:
        if recipe is None:
            return transformers_row(args, case)
        with lvlm.load(bundle_folder(args, name), device=args.device, verify="none") as model:
            prompts = [
                with_image(prompt_for(model.manifest, case.prompt, case.new, row))
                for row in range(case.batch)
            ]
            run_ours(model, prompts, 4, options)
            return run_ours(model, prompts, case.new, options)
    except LvlmError as error:
        return {"reason": str(error)}


def run_ours(
    model: lvlm.Model, prompts: list[Prompt], new: int, options: dict[str, Any]
) -> Figures:
    batch = model.calls.start(prompts, **options)
    began = time.perf_counter()
    for _ in range(new - 1):
        batch.feed(batch.logits.argmax(1).tolist())
    step = (time.perf_counter() - began) * 1e3 / max(1, new - 1)
    return {
        "prefill": batch.running[0].prefill_ms,
        "step": step,
        "cache": batch.cache.bytes_allocated,
    }


def with_image(prompt: Prompt) -> Prompt:
    if not prompt.images:
        raise ParameterError(f"a prompt of {len(prompt.ids)} has no room for an image's tokens")
    return prompt


def transformers_row(args: argparse.Namespace, case: DecodeCase) -> Figures:
    """The same prompts in transformers: fp16 and its fused attention on a GPU."""
    import torch
    from transformers import DynamicCache

    place = "cpu" if args.device == "cpu" else "cuda"
    dtype = torch.float32 if args.shape == "tiny" else torch.float16
    config = json.loads((checkpoint(args) / "config.json").read_text(encoding="utf-8"))
    side, patch = (config["vision_config"][key] for key in ("image_size", "patch_size"))
    tokens, vocab = (side // patch) ** 2, config["text_config"]["vocab_size"]
    prompts = [
        with_image(
            random_prompt(case.prompt, case.new, row, tokens=tokens, size=(side, side), vocab=vocab)
        )
        for row in range(case.batch)
    ]
    ids = torch.tensor([list(p.ids) for p in prompts], device=place)
    arrays = [p.images[0].arrays["pixel_values"] for p in prompts]
    pixels = torch.from_numpy(np.concatenate(arrays)).to(place, dtype)

    def wait() -> float:
        if place == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(new: int) -> Figures:
        cache = DynamicCache(config=model.config.get_text_config())
        embeds = model.get_input_embeddings()(ids)
        features = model.get_image_features(pixels).pooler_output
        for row in range(case.batch):
            embeds[row, BEFORE : BEFORE + tokens] = features[row]
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
            model = transformers_model(checkpoint(args), dtype, place)
            run(4)
            return run(case.new)
    except torch.OutOfMemoryError as error:
        return {"reason": f"out of memory ({str(error).split('. ')[0]})"}


@cache
def transformers_model(folder: Path, dtype: Any, place: str) -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(place).eval()


if __name__ == "__main__":
    main()
