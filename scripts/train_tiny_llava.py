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
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F  # noqa: N812  (the field's own name)
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lvlm.calibration.datasets import digits

PATCHES = 12
IMAGE_TOKENS = PATCHES * PATCHES
TURNS: tuple[digits.Kind, ...] = ("describe",) + ("row",) * 3 + ("cell",) * 4 + ("count",) * 2
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ 'ASSISTANT: ' }}
{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}
{{ eos_token }}
{%- else -%}
{{ 'USER: ' if message['role'] == 'user' else '' }}
{%- for part in message['content'] if part['type'] == 'image' -%}
{{ '<image>\\n' }}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{ part['text'] + ' ' }}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


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


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE (any text can be encoded) with every decimal digit a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\d| ?[^\s\d]+|\s"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [
        f"USER: \n{q.question} ASSISTANT: {q.answer}" for _, q in digits.samples("train", 400)
    ]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,  # the feature layer is -2, as in LLaVA-1.5, so four are used
        num_attention_heads=4,
        image_size=digits.SIDE,
        patch_size=14,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=image_id,
            image_seq_length=IMAGE_TOKENS,
            vision_feature_layer=-2,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():  # 2-D sinusoids: the tower starts out knowing which patches are near
        table = model.model.vision_tower.embeddings.position_embedding.weight
        table[1:] = 0.5 * sinusoids_2d(PATCHES, table.shape[1])
    return model


def sinusoids_2d(side: int, width: int) -> torch.Tensor:
    """Position table [side * side, width]: half for the row, half for the column."""
    step = torch.arange(side)[:, None] * math.pi / side
    freq = torch.arange(1, width // 4 + 1)[None] / 2
    line = torch.cat([torch.sin(step * freq), torch.cos(step * freq)], 1) / math.sqrt(width / 8)
    rows = line.repeat_interleave(side, 0)
    return torch.cat([rows, line.repeat(side, 1)], 1)


def pixels(grids: list[digits.Grid]) -> torch.Tensor:
    """Normalised [B, 3, 168, 168]; the images already have the size the processor makes."""
    scale = CLIPImageProcessorPil()
    images = np.stack([g.image for g in grids]).astype(np.float32) / 255
    images = (images - np.array(scale.image_mean)) / np.array(scale.image_std)
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))


def patch_features(model: LlavaForConditionalGeneration, images: torch.Tensor) -> torch.Tensor:
    """[B, 144, 128]: what the projector reads."""
    out = model.model.vision_tower(images, output_hidden_states=True)
    patches: torch.Tensor = out.hidden_states[-2][:, 1:]
    return patches


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


class Layout:
    """Where prefix, questions and answers lie in a training sequence; equal for every grid,
    because every digit is one token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.prefix = [1, *self.encode("USER: "), *[3] * IMAGE_TOKENS, *self.encode("\n")]
        self.image_at = len(self.prefix) - IMAGE_TOKENS - len(self.encode("\n"))
        _, answered, turn, position = self.sequence(
            digits.draw_grid(np.random.default_rng(0), "train"), np.random.default_rng(0)
        )
        self.answered, self.position = answered, position
        size = len(turn)
        sees = (turn[None] == turn[:, None]) | (turn[None] == -1)
        sees &= torch.ones(size, size, dtype=torch.bool).tril()
        self.mask = torch.zeros(size, size).masked_fill(~sees, -1e9)[None, None]
        # Kind of each predicted answer token, for reports.
        self.kinds = [TURNS[int(t)] for t in turn[answered]]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def sequence(self, grid: digits.Grid, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        """ids [S], whether a token belongs to an answer [S], its turn [S], its position [S]."""
        ids, answered = list(self.prefix), [False] * len(self.prefix)
        turn, position = [-1] * len(ids), list(range(len(ids)))
        for number, kind in enumerate(TURNS):
            q = digits.ask(grid, kind, rng)
            question = self.encode(q.question + " ASSISTANT:")
            answer = [*self.encode(" " + q.answer), 2]
            ids += question + answer
            answered += [False] * len(question) + [True] * len(answer)
            length = len(question) + len(answer)
            turn += [number] * length
            position += range(len(self.prefix), len(self.prefix) + length)
        return (
            torch.tensor(ids),
            torch.tensor(answered),
            torch.tensor(turn),
            torch.tensor(position),
        )

    def logits(
        self, model: LlavaForConditionalGeneration, features: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, answer tokens, vocabulary] and the ids they should name."""
        embeds = model.model.language_model.embed_tokens(ids)
        image = model.model.multi_modal_projector(features)
        end = self.image_at + IMAGE_TOKENS
        embeds = torch.cat([embeds[:, : self.image_at], image, embeds[:, end:]], 1)
        hidden = model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=self.mask.expand(len(ids), -1, -1, -1),
            position_ids=self.position.expand(len(ids), -1),
            use_cache=False,
        ).last_hidden_state
        before = self.answered.roll(-1)
        before[-1] = False
        return model.lm_head(hidden[:, before]), ids[:, self.answered]


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


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, *, grids: int
) -> dict[str, Any]:
    """Share of held-out answer tokens right (teacher-forced), in all, per kind and digits only."""
    layout, rng = Layout(tokenizer), np.random.default_rng(4)
    digit_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    right, is_digit = [], []
    for first in range(0, grids, 20):
        batch = [digits.draw_grid(rng, "heldout") for _ in range(min(20, grids - first))]
        ids = torch.stack([layout.sequence(g, rng)[0] for g in batch])
        logits, target = layout.logits(model, patch_features(model, pixels(batch)), ids)
        right.append(logits.argmax(-1) == target)
        is_digit.append(torch.isin(target, digit_ids))
    ok, digit = torch.cat(right), torch.cat(is_digit)
    kinds = np.array(layout.kinds)
    return {
        "heldout_grids": grids,
        "answer_tokens": ok.numel(),
        "answer_tokens_right": round(ok.float().mean().item(), 4),
        "digit_tokens_right": round(ok[digit].float().mean().item(), 4),
        "answer_tokens_right_by_kind": {
            k: round(ok[:, kinds == k].float().mean().item(), 4) for k in sorted(set(TURNS))
        },
        "digit_tokens_right_by_kind": {
            k: round(ok[:, kinds == k][digit[:, kinds == k]].float().mean().item(), 4)
            for k in sorted(set(TURNS))
        },
    }


def save(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, output: Path
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = 2
    model.half().save_pretrained(output)
    side = {"height": digits.SIDE, "width": digits.SIDE}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": digits.SIDE}, crop_size=side)
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(output)


def save_samples(folder: Path) -> None:
    """The images of README and tests: held-out grids."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (grid, _) in enumerate(digits.samples("heldout", 2, seed=7), 1):
        Image.fromarray(grid.image).save(folder / f"digits-{number}.png")


if __name__ == "__main__":
    main()
