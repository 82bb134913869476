"""Train ``tiny-llava``, a real small vision-language model, from scratch.

First the vision tower alone: from every patch, name the thing there and its colour. Then all of it,
on sequences of images and many questions, the patches' names still asked beside.

    python scripts/train_tiny_llava.py --output out --work /tmp/tiny-llava

Resumable: run it again with the same --work. A GPU takes minutes, two CPU cores many hours. The
images and questions of a step depend only on its number; --minutes ends a stage (and its learning
rate) early. Prints held-out accuracy measured on the
stored fp16 weights and writes it to training.json beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tiny_llava.held_out import evaluate
from tiny_llava.packed import losses, names_of_patches, on_device
from tiny_llava.sequences import Mix, Packer, SequenceBatch, mix_of_step
from tiny_llava.shape import VISION_WIDTH, build_model, build_tokenizer, save
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from lvlm.calibration.datasets.scenes.drawing import COLOURS, NAMES


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    training = Training(args, tokenizer)
    training.run("vision", args.vision_steps, args.vision_minutes)
    training.run("all", args.steps, args.minutes)
    save(training.model.cpu(), tokenizer, args.output)
    stored = LlavaForConditionalGeneration.from_pretrained(args.output, dtype=torch.float32)
    report = evaluate(stored.eval().to(args.device), tokenizer, args.eval_batches, args.workers)
    report["training"] = training.report
    (args.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints of both stages")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step")
    parser.add_argument("--workers", type=int, default=14, help="processes that draw images")
    parser.add_argument("--vision-steps", type=int, default=3000)
    parser.add_argument("--vision-minutes", type=float, default=math.inf)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="steps end there, too")
    parser.add_argument("--eval-batches", type=int, default=40, help="of 16 sequences")
    parser.add_argument("--peak", type=float, default=1.2e-3, help="largest learning rate")
    return parser.parse_args()


class Batches(Dataset[SequenceBatch]):
    """Batch number ``step`` of a stage."""

    def __init__(self, packer: Packer, stage: str, size: int, steps: int) -> None:
        self.packer, self.stage, self.size, self.steps = packer, stage, size, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> SequenceBatch:
        torch.set_num_threads(1)
        if self.stage == "vision":
            return self.packer.batch((1, step), 2 * self.size, Mix((), 1), "train")
        mix = mix_of_step(step)
        return self.packer.batch((2, step), self.size // mix.images, mix, "train")


class Training:
    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> None:
        self.args, self.packer = args, Packer(tokenizer)
        self.model = build_model(tokenizer).to(args.device)
        self.tower = self.model.model.vision_tower
        self.head = torch.nn.Linear(VISION_WIDTH, 1 + len(NAMES) + 1 + len(COLOURS))
        self.head.to(args.device)
        self.report: dict[str, dict[str, float]] = {}

    def run(self, stage: str, steps: int, minutes: float) -> None:
        file = self.args.work / f"{stage}.pt"
        optimizer, scale = self._optimizer(stage)
        start, spent = 0, 0.0
        if file.exists():
            state = torch.load(file, map_location=self.args.device)
            self.model.load_state_dict(state["model"])
            self.head.load_state_dict(state["head"])
            optimizer.load_state_dict(state["optimizer"])
            start, spent = state["step"], state["seconds"]
        began = time.time() - spent
        step, saved = start, time.time()
        for step, batch in self._batches(stage, start, steps):
            progress = max(step / steps, (time.time() - began) / 60 / minutes)
            if progress >= 1:
                break
            rate = self.args.peak * schedule(step, progress)
            for group, factor in zip(optimizer.param_groups, scale, strict=True):
                group["lr"] = rate * factor
            said = self._step(stage, batch, optimizer, progress)
            if step % 100 == 99:
                parts = " ".join(f"{k} {v.item():.4f}" for k, v in said.items())
                print(f"{stage} {step + 1}/{steps} {parts} {time.time() - began:.0f} s", flush=True)
            if time.time() - saved > 120:
                self._store(file, step + 1, time.time() - began, optimizer)
                saved = time.time()
        self._store(file, max(step, start), time.time() - began, optimizer)
        self.report[stage] = {"steps": step + 1, "seconds": round(time.time() - began)}

    def _optimizer(self, stage: str) -> tuple[torch.optim.Optimizer, list[float]]:
        seeing = [*self.tower.parameters(), *self.head.parameters()]
        tower = {id(p) for p in self.tower.parameters()}
        reading = [p for p in self.model.parameters() if id(p) not in tower]
        groups = [seeing] if stage == "vision" else [seeing, reading]
        optimizer = torch.optim.AdamW(
            [{"params": g} for g in groups], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05
        )
        return optimizer, [1.0] if stage == "vision" else [0.4, 1.0]

    def _batches(self, stage: str, start: int, steps: int) -> Iterator[tuple[int, SequenceBatch]]:
        loader = DataLoader(
            Batches(self.packer, stage, self.args.batch, steps),
            batch_size=None,
            sampler=range(start, steps),
            num_workers=self.args.workers,
            pin_memory=self.args.device != "cpu",
            prefetch_factor=4 if self.args.workers else None,
        )
        yield from zip(range(start, steps), loader, strict=True)

    def _step(
        self, stage: str, batch: SequenceBatch, optimizer: torch.optim.Optimizer, progress: float
    ) -> dict[str, torch.Tensor]:
        batch = on_device(batch, self.args.device)
        kind = torch.device(self.args.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            if stage == "vision":
                loss, said = names_of_patches(self.model, self.head, batch)
            else:
                loss, said = losses(self.model, self.head, batch, 0.3 * (1 - progress) + 0.02)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        learned = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        return {"loss": loss.detach(), **said}

    def _store(
        self, file: Path, step: int, seconds: float, optimizer: torch.optim.Optimizer
    ) -> None:
        state = {"model": self.model.state_dict(), "head": self.head.state_dict()}
        state |= {"optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(file)


def schedule(step: int, progress: float) -> float:
    """Share of the largest learning rate: a short rise, then a cosine down to nearly nothing."""
    return min(1.0, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


if __name__ == "__main__":
    main()
