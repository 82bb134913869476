"""An image and many questions about it as one sequence for ``tiny-llava``; right answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tiny_llava import IMAGE_TOKENS, patch_features, pixels
from transformers import (
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from lvlm.calibration.datasets import digits

TURNS: tuple[digits.Kind, ...] = ("describe",) + ("row",) * 3 + ("cell",) * 4 + ("count",) * 2


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
