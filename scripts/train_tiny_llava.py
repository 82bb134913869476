"""Train ``tiny-llava``, the real small model shipped in assets/, from scratch on two CPU cores.

Stage 1 teaches the vision tower alone: from every patch, name the digit of its cell and the cell.
Stage 2 freezes it and teaches the projector and the language model the questions. Each training
sequence is one image followed by many questions that cannot see each other (block mask, positions
restarted), so that the image's tokens are paid for once.

    python scripts/train_tiny_llava.py --output assets/tiny-llava --work /tmp/tiny-llava

Resumable: run it again with the same --work. Prints held-out accuracy measured on the stored fp16
weights and writes it to training.json beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tiny_llava import (
    IMAGE_TOKENS,
    PATCHES,
    build_model,
    build_tokenizer,
    patch_features,
    pixels,
    save,
    save_samples,
)
from tiny_llava_sequences import TURNS, Layout, evaluate
from torch.nn import functional as F  # noqa: N812  (the field's own name)
from transformers import (
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from lvlm.calibration.datasets import digits


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train_vision(model, args)
    train_language(model, tokenizer, args)
    save(model, tokenizer, args.output)
    save_samples(args.output.parent / "samples")
    stored = LlavaForConditionalGeneration.from_pretrained(args.output, dtype=torch.float32).eval()
    report = evaluate(stored, tokenizer, grids=args.eval_grids)
    report["arguments"] = {"stage1_steps": args.stage1_steps, "stage2_steps": args.stage2_steps}
    (args.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("assets/tiny-llava"))
    parser.add_argument("--work", type=Path, required=True, help="checkpoints of both stages")
    parser.add_argument("--stage1-steps", type=int, default=1500)
    parser.add_argument("--stage2-steps", type=int, default=700)
    parser.add_argument("--pool", type=int, default=8000, help="images encoded for stage 2")
    parser.add_argument("--eval-grids", type=int, default=500)
    return parser.parse_args()


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 50)
    return peak * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_vision(model: LlavaForConditionalGeneration, args: argparse.Namespace) -> None:
    tower, file = model.model.vision_tower, args.work / "stage1.pt"
    head = torch.nn.Linear(128, 10 + 9)
    params = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.98), weight_decay=0.05)
    start = 0
    if file.exists():
        state = torch.load(file)
        tower.load_state_dict(state["tower"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    row = torch.arange(IMAGE_TOKENS) // PATCHES // 4
    col = torch.arange(IMAGE_TOKENS) % PATCHES // 4
    cell = row * 3 + col

    def loss_and_accuracy(grids: list[digits.Grid]) -> tuple[torch.Tensor, float]:
        scores = head(patch_features(model, pixels(grids))).flatten(0, 1)
        digit = torch.tensor([g.digits for g in grids])[:, cell].flatten()
        loss = F.cross_entropy(scores[:, :10], digit)
        loss = loss + 0.3 * F.cross_entropy(scores[:, 10:], cell.repeat(len(grids)))
        return loss, (scores[:, :10].argmax(-1) == digit).float().mean().item()

    held_rng = np.random.default_rng(5)
    held = [digits.draw_grid(held_rng, "heldout") for _ in range(64)]
    began = time.time()
    for step in range(start, args.stage1_steps):
        rng = np.random.default_rng([1, step])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.stage1_steps, 1.5e-3)
        loss, accuracy = loss_and_accuracy([digits.draw_grid(rng, "train") for _ in range(32)])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if step % 50 == 49:
            with torch.no_grad():
                held_accuracy = loss_and_accuracy(held)[1]
            print(
                f"stage 1 step {step + 1}/{args.stage1_steps} loss {loss.item():.3f} "
                f"patches right: train {accuracy:.3f} held-out {held_accuracy:.3f} "
                f"{time.time() - began:.0f} s",
                flush=True,
            )
            state = {"tower": tower.state_dict(), "head": head.state_dict(), "step": step + 1}
            torch.save(state | {"optimizer": optimizer.state_dict()}, file)


def train_language(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
) -> None:
    file, layout = args.work / "stage2.pt", Layout(tokenizer)
    learner = [
        *model.model.multi_modal_projector.parameters(),
        *model.model.language_model.parameters(),
        *model.lm_head.parameters(),
    ]
    optimizer = torch.optim.AdamW(learner, betas=(0.9, 0.98), weight_decay=0.05)
    start = 0
    if file.exists():
        state = torch.load(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    if start >= args.stage2_steps:
        return
    pool, features = encode_pool(model, args.pool)
    kinds = np.array(layout.kinds)
    began = time.time()
    for step in range(start, args.stage2_steps):
        rng = np.random.default_rng([2, step])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.stage2_steps, 1.5e-3)
        chosen = rng.choice(len(pool), size=16, replace=False)
        ids = torch.stack([layout.sequence(pool[i], rng)[0] for i in chosen])
        logits, target = layout.logits(model, features[chosen].float(), ids)
        each = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        # Every kind weighs the same: the long descriptions would drown the short answers.
        loss = torch.stack([each[:, kinds == kind].mean() for kind in set(TURNS)]).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learner, 1.0)
        optimizer.step()
        if step % 25 == 24:
            right = (logits.argmax(-1) == target).float().mean().item()
            print(
                f"stage 2 step {step + 1}/{args.stage2_steps} loss {loss.item():.4f} "
                f"answer tokens right {right:.3f} {time.time() - began:.0f} s",
                flush=True,
            )
        if step % 200 == 199 or step + 1 == args.stage2_steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1}, file)
            print(json.dumps(evaluate(model, tokenizer, grids=64)), flush=True)


@torch.no_grad()
def encode_pool(
    model: LlavaForConditionalGeneration, size: int
) -> tuple[list[digits.Grid], torch.Tensor]:
    rng = np.random.default_rng(3)
    grids, features = [], []
    for _ in range(size // 50):
        batch = [digits.draw_grid(rng, "train") for _ in range(50)]
        grids += batch
        features.append(patch_features(model, pixels(batch)).half())
    return grids, torch.cat(features)


if __name__ == "__main__":
    main()
