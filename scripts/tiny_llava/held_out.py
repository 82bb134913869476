"""Accuracy of ``tiny-llava`` on held-out images."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from lvlm.calibration.datasets.scenes.drawing import DENSITIES
from lvlm.calibration.datasets.scenes.questions import KINDS
from tiny_llava.packed import answer_logits, on_device
from tiny_llava.sequences import ONE, TWO, Mix, Packer, SequenceBatch
from tiny_llava.shape import patch_features

SIZE = 16
EVERY = "every kind"


class HeldOut(Dataset[SequenceBatch]):
    """Batches of held-out images, every fourth of sequences with two."""

    def __init__(self, packer: Packer, batches: int) -> None:
        self.packer, self.batches = packer, batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number: int) -> SequenceBatch:
        mix: Mix = TWO if number % 4 == 3 else ONE
        return self.packer.batch((9, number), SIZE, mix, "heldout")


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    batches: int,
    workers: int,
) -> dict[str, Any]:
    """Share of answers that are exact, and of answer tokens that are right.

    Each token is asked for after the right ones before it: an answer is exact if all of its tokens
    are right, just as when it is generated greedily.
    """
    right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    exact: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    loader = DataLoader(HeldOut(Packer(tokenizer), batches), batch_size=None, num_workers=workers)
    for drawn in loader:
        batch = on_device(drawn, str(model.device))
        logits, target, _ = answer_logits(model, patch_features(model, batch.images), batch)
        ok = (logits.argmax(-1) == target).cpu()
        answered = drawn.kind >= 0
        row = torch.arange(len(drawn.ids))[:, None].expand_as(answered)[answered]
        answer = row * 1000 + drawn.turn[answered]
        kinds, density = drawn.kind[answered], drawn.density[row]
        _, first, which = _unique(answer)
        wrong = torch.zeros(len(first), dtype=torch.long).index_add_(0, which, (~ok).long())
        for kind, dense, bad in zip(
            kinds[first].tolist(), density[first].tolist(), wrong.tolist(), strict=True
        ):
            for name in (EVERY, KINDS[kind], f"{KINDS[kind]} {DENSITIES[dense]}"):
                exact[name][0] += bad == 0
                exact[name][1] += 1
        for number, kind_name in enumerate(KINDS):
            mine = ok[kinds == number]
            for name in (EVERY, kind_name):
                right[name][0] += int(mine.sum())
                right[name][1] += len(mine)
    return {
        "answers": exact[EVERY][1],
        "answer_tokens": right[EVERY][1],
        "answer_tokens_right": {k: round(a / max(b, 1), 4) for k, (a, b) in right.items()},
        "exact": {k: round(a / max(b, 1), 4) for k, (a, b) in sorted(exact.items())},
    }


def _unique(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distinct values, where each is first, and which one each value is."""
    found, which = torch.unique(values, return_inverse=True)
    places = torch.arange(len(values) - 1, -1, -1)
    first = torch.empty(len(found), dtype=torch.long).scatter_(0, which.flip(0), places)
    return found, first, which
