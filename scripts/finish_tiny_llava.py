"""Train ``tiny-llava`` on, with image tokens missing: the tower as it is, the rest learns.

    python scripts/finish_tiny_llava.py --start out --output done --work /tmp/fewer --minutes 80

For two CPU cores with bf16; resumable with the same --work, the minutes are those of all runs. The
images, questions and what is missing of a step depend only on its number. Stored are weights
between those of the start and those learned (--mix). Prints held-out
accuracy of the stored fp16 weights, with all image tokens, and writes it to training.json beside
them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from tiny_llava.held_out import evaluate
from tiny_llava.packed import answer_loss
from tiny_llava.sequences import FEWER, TWO, Packer
from tiny_llava.shape import patch_features, save
from tiny_llava.thinned import draw_cuts
from train_tiny_llava import schedule
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

WARM = 4  # times as fast to the largest learning rate as a run from nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--start", type=Path, required=True, help="a trained tiny-llava")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--peak", type=float, default=4e-4, help="largest learning rate")
    parser.add_argument("--mix", type=float, default=0.6, help="how far from the start to go")
    parser.add_argument("--eval-batches", type=int, default=40, help="of 16 sequences")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
    model = LlavaForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    steps, seconds = train(model, Packer(tokenizer), args)
    # Between the two full images are read nearly as before, and thinned ones nearly as now.
    learned = model.state_dict()
    model.load_state_dict({n: torch.lerp(start[n], learned[n], args.mix) for n in start})
    save(model, tokenizer, args.output)
    stored = LlavaForConditionalGeneration.from_pretrained(args.output, dtype=torch.float32)
    report = evaluate(stored.eval(), tokenizer, args.eval_batches, 0)
    before = json.loads((args.start / "training.json").read_text())["training"]
    report["training"] = before | {"fewer": {"steps": steps, "seconds": round(seconds)}}
    (args.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def train(
    model: LlavaForConditionalGeneration, packer: Packer, args: argparse.Namespace
) -> tuple[int, float]:
    """Steps and seconds, of all runs with this --work."""
    tower = {id(p) for p in model.model.vision_tower.parameters()}
    learned = [p for p in model.parameters() if id(p) not in tower]
    optimizer = torch.optim.AdamW(learned, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    file, step, spent = args.work / "fewer.pt", 0, 0.0
    if file.exists():
        state = torch.load(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
    began = saved = time.time()
    while (progress := (spent + time.time() - began) / 60 / args.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.peak * schedule(WARM * step, progress)
        mix = TWO if step % 6 == 5 else FEWER
        batch = packer.batch((3, step), args.batch // mix.images, mix, "train")
        cuts = draw_cuts(batch, torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                features = patch_features(model, batch.images)
            loss, said = answer_loss(model, features, batch, cuts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        left = [f"{cut.columns.shape[1]} from {cut.block}" for cut in cuts]
        parts = " ".join(f"{k} {v.item():.4f}" for k, v in said.items())
        step += 1
        print(f"{step} {parts} {spent + time.time() - began:.0f} s {', '.join(left)}", flush=True)
        if time.time() - saved > 300:
            _store(file, model, optimizer, step, spent + time.time() - began)
            saved = time.time()
    _store(file, model, optimizer, step, spent + time.time() - began)
    return step, spent + time.time() - began


def _store(
    file: Path,
    model: LlavaForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    partial = file.with_suffix(".partial")
    torch.save(state | {"step": step, "seconds": seconds}, partial)
    partial.replace(file)


if __name__ == "__main__":
    main()
