"""The torch reference of a recipe: the checkpoint's own modules, one prompt at a time, no padding.

Prefill and Decode run eagerly here, with every lvlm op as its torch reference. What a bundle says
on ONNX Runtime must equal this token for token in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lvlm.export.checkpoint import Checkpoint
from lvlm.export.families._base import Family
from lvlm.export.language import Decode, LanguageModel, Prefill
from lvlm.export.recipes._base import Recipe
from lvlm.export.skeleton import default_dtype
from lvlm.runtime.schedule import Keep, keep_ratios, plan_prefill


@dataclass
class Answer:
    """Greedy tokens, the logits [vocabulary] each was chosen from, and what prefill left.

    caches: key and value [1,Hkv,entries,d] of every layer; maps: old -> new [N] of each reduction.
    """

    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    caches: list[torch.Tensor] = field(default_factory=list)
    maps: list[torch.Tensor] = field(default_factory=list)


class Reference:
    """A checkpoint in fp32 with a recipe, run by torch."""

    def __init__(self, family: Family, config: Any, model: nn.Module, recipe: Recipe) -> None:
        self.model = model.eval()
        self.language: LanguageModel = family.language(model, config)
        self.recipe = recipe.for_layers(len(self.language.blocks))
        self.vision = family.vision(model, config)

    @torch.no_grad()
    def encode(self, pixels: np.ndarray) -> torch.Tensor:
        """image_features [P,V,D] of pixels fp32 [P,3,H,W]."""
        features = self.vision(torch.from_numpy(pixels))
        assert isinstance(features, torch.Tensor)
        return features

    @torch.no_grad()
    def generate(
        self,
        ids: Sequence[int],
        image_id: np.ndarray,
        features: torch.Tensor,
        *,
        max_new_tokens: int,
        keep: Keep | None = None,
        eos_ids: Sequence[int] = (),
        forced: Sequence[int] = (),
    ) -> Answer:
        """Greedy answer to one prompt; ``forced`` tokens are taken instead of the best ones."""
        layers = len(self.language.blocks)
        counts = np.unique(image_id[image_id > 0], return_counts=True)[1].tolist()
        reductions = self.recipe.reductions()
        exported = float(self.recipe.parameters().get("keep", 1.0))
        after = np.flatnonzero(image_id > 0)
        tail = len(ids) - int(after[-1]) - 1 if len(after) else 0
        plan = plan_prefill(
            reductions,
            keep_ratios(reductions, exported, keep),
            layers,
            [len(ids) - sum(counts)],
            [counts],
            [tail],
        )
        answer = Answer(entries=plan.entries[:, 0].tolist())
        caches = self._empty_caches(answer.entries, max_new_tokens)
        rows = np.full(len(ids), -1)
        rows[image_id > 0] = np.arange(sum(counts))
        extra = [torch.from_numpy(plan.inputs[i.name]) for i in self.recipe.inputs()]
        logits, *rest = Prefill(self.language, self.recipe)(
            torch.tensor([list(ids)]),
            features if len(features) else features.new_zeros(1, 1, self.language.hidden),
            torch.from_numpy(rows)[None],
            torch.from_numpy(image_id)[None],
            torch.arange(len(ids))[None],
            extra,
            caches,
        )
        answer.maps = [m[0] for m in rest[: len(reductions)]]
        caches = rest[len(reductions) :]
        answer.caches = [
            cache[:, :, : answer.entries[i // 2]].clone() for i, cache in enumerate(caches)
        ]
        decode = Decode(self.language)
        for step in range(max_new_tokens):
            answer.logits.append(logits[0])
            token = forced[step] if step < len(forced) else int(logits[0].argmax())
            answer.tokens.append(token)
            if token in eos_ids or step + 1 == max_new_tokens:
                break
            write = plan.entries + step
            logits, *caches = decode(
                torch.tensor([[token]]),
                torch.tensor([[len(ids) + step]]),
                torch.from_numpy(write),
                torch.from_numpy(write + 1),
                caches,
            )
        return answer

    def _empty_caches(self, entries: Sequence[int], room: int) -> list[torch.Tensor]:
        shape = self.language.kv_heads, self.language.head_dim
        return [
            torch.zeros(1, shape[0], count + room, shape[1]) for count in entries for _ in range(2)
        ]


def load_fp32(
    family: Family,
    config: Any,
    checkpoint: Checkpoint,
    stored_names: dict[str, str],
    rounding: torch.dtype,
) -> nn.Module:
    """The whole model in fp32, its weights rounded to the bundle's dtype."""
    with default_dtype(torch.float32):
        model = family.build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.copy_(checkpoint.read(stored_names[name]).to(rounding))
    return model.eval().requires_grad_(False)
