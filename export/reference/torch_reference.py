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

from lvlm.core.errors import ValidationError
from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.export.checkpoint.model_shape import build_shape, with_parameters
from lvlm.export.families.family import Family
from lvlm.export.graphs.language_graph import CAPACITY, Caches, Kind, past_inputs
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.prefill import Prefill
from lvlm.export.leaves import leaves_of
from lvlm.export.ports import BATCH
from lvlm.export.recipes.recipe import Recipe
from lvlm.export.reference.naive_cache import NaiveCache
from lvlm.export.weights.stored_weights import compute_in_fp32
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.image_tokens import keep_ratios, plan_prefill
from lvlm.runtime.media.prepared_image import ImageTokens, PreparedImage
from lvlm.runtime.options.generation_options import Keep
from lvlm.runtime.prompt.prompts import Prompt
from lvlm.runtime.prompt.shortened import placed, shortened


@dataclass
class ReferenceAnswer:
    """Greedy tokens, the logits [vocabulary] each was chosen from, and what prefill left.

    entries entered each layer, kept of them stayed; caches: key and value [1,Hkv,kept,d] of every
    layer; maps: old -> new [N] of each reduction.
    """

    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    caches: list[torch.Tensor] = field(default_factory=list)
    maps: list[torch.Tensor] = field(default_factory=list)


class Reference:
    """A checkpoint in fp32 with a recipe, run by torch; the cache may be of lower precision."""

    def __init__(
        self,
        family: Family,
        config: Any,
        model: nn.Module,
        recipe: Recipe,
        cache_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.cache_dtype = model.eval(), cache_dtype
        self.language: LanguageModel = family.language(model, config)
        self.recipe = recipe.for_layers(
            len(self.language.attending), self.language.deepstack_layers
        )
        self.vision = family.vision(model, config)

    def read_at(self, prompt: Prompt, keep: Keep | None = None) -> Prompt:
        """The prompt without the image tokens that the recipe drops at the encoder's output."""
        reduction = self.recipe.encoder_reduction()
        if reduction is None:
            return prompt
        prompt = shortened(prompt, reduction, self._ratios(keep)[0])
        tokens = self.tokens(prompt.images)
        return placed(prompt, range(1, len(tokens) + 1), [one.indices for one in tokens])

    def _ratios(self, keep: Keep | None) -> tuple[float, ...]:
        exported = float(self.recipe.parameters().get("keep", 1.0))
        return keep_ratios(self.recipe.shortenings(), exported, keep)

    @torch.no_grad()
    def encode(self, images: Sequence[PreparedImage]) -> torch.Tensor:
        """image_features [R,D] of all images' tokens in order, without those that are dropped."""
        found = [np.zeros((0, self.language.feature_width), np.float32)]
        found += [tokens.features for tokens in self.tokens(images)]
        return torch.from_numpy(np.concatenate(found))

    @torch.no_grad()
    def tokens(self, images: Sequence[PreparedImage]) -> list[ImageTokens]:
        """Each image's tokens that the language model reads."""
        found = []
        for image in images:
            features, scores = self._seen(image)
            before = image.asks_before
            frame = None if before is None else self._seen(before)[0]
            found.append(image.chosen(features, scores, frame))
        return found

    def _seen(self, image: PreparedImage) -> tuple[np.ndarray, np.ndarray | None]:
        """Features [V,D] of an image, and the scores [V,S] that the tower gives besides."""
        arrays = {k: torch.from_numpy(x) for k, x in image.arrays.items()}
        if not self.recipe.scored:
            return image.features(self.vision(**arrays).numpy()), None
        rows, given = self.vision.scored(**arrays)  # type: ignore[operator]
        return image.features(rows.numpy()), image.features(given.float().numpy())

    @torch.no_grad()
    def generate(
        self,
        prompt: Prompt,
        features: torch.Tensor,
        *,
        max_new_tokens: int,
        keep: Keep | None = None,
        kv_keep: float | None = None,
        eos_ids: Sequence[int] = (),
        forced: Sequence[int] = (),
    ) -> ReferenceAnswer:
        """Greedy answer to one prompt, read at ``keep``; ``forced`` tokens are taken instead of
        the best ones."""
        layers, ids, image_id = len(self.language.attending), prompt.ids, prompt.image_id
        counts = np.unique(image_id[image_id > 0], return_counts=True)[1].tolist()
        reductions, rule = self.recipe.shortenings(), self.recipe.cache_rule()
        after = np.flatnonzero(image_id > 0)
        tail = len(ids) - int(after[-1]) - 1 if len(after) else 0
        plan = plan_prefill(
            reductions,
            self._ratios(keep),
            layers,
            [len(ids) - sum(counts)],
            [[image.tokens for image in prompt.images]],
            [tail],
            [counts] if self.recipe.encoder_reduction() is not None else None,
        )
        budgets = Budgets.of(rule.cache_policy if rule else None, layers, kv_keep)
        kept = budgets.prompt(plan.entries)
        answer = ReferenceAnswer(entries=plan.entries[:, 0].tolist(), kept=kept[:, 0].tolist())
        rows = np.full(len(ids), -1)
        rows[image_id > 0] = np.arange(sum(counts))
        given = plan.inputs | {"kv_budget": kept}
        given |= {f"kv_slots_{i}": np.arange(n) for i, n in enumerate(answer.kept)}
        prefill = Prefill(self.language, self.recipe, features.dtype, self.cache_dtype)
        left = prefill(
            {
                "input_ids": torch.tensor([list(ids)]),
                "image_features": features
                if len(features)
                else features.new_zeros(1, self.language.feature_width),
                "image_row": torch.from_numpy(rows)[None],
                "image_id": torch.from_numpy(image_id)[None],
                "position_ids": torch.from_numpy(prompt.positions[..., None, :]),
                **{name: torch.from_numpy(x) for name, x in given.items()},
                **past_inputs(self._empty_buffers(answer.kept, prefill)),
            }
        )
        answer.maps = [left[port.name][0] for port in self.recipe.outputs()]
        if rule is not None and not torch.equal(left["kept"], torch.from_numpy(kept)):
            raise ValidationError("the attention that ranks the cache entries is not finite")
        last = (prompt.whole or prompt).positions[..., -1]
        cache = NaiveCache(self.language, rule, budgets, prefill.caches(left), plan.entries[:, 0])
        logits = left["logits"]
        answer.caches = cache.entries()
        for step in range(max_new_tokens):
            answer.logits.append(logits[0])
            token = forced[step] if step < len(forced) else int(logits[0].argmax())
            answer.tokens.append(token)
            if token in eos_ids or step + 1 == max_new_tokens:
                break
            # As in generate, each of three counts on by itself: the runtime has one number for all
            logits = cache.decode(token, last + 1 + step)
        return answer

    def _empty_buffers(self, kept: Sequence[int], prefill: Prefill) -> Caches:
        """Buffers that prefill writes into: exactly as long as what it keeps."""
        forms = prefill.buffer_forms()

        def empty(kind: Kind, count: int) -> torch.Tensor:
            dtype, dims = forms[kind]
            dynamic = {BATCH: 1, CAPACITY: count}
            sizes = [size if isinstance(size, int) else dynamic[size] for size in dims]
            return torch.zeros(sizes, dtype=dtype)

        found = {kind: [empty(kind, count) for count in kept] for kind in prefill.kinds}
        states = [
            torch.zeros(*map(int, (1, *port.dims[1:])), dtype=port.dtype)
            for port in prefill.state_ports("past")
        ]
        return {**found, "state": states}


def load_fp32(
    family: Family,
    config: Any,
    checkpoint: Checkpoint,
    stored_names: dict[str, str],
    rounding: torch.dtype,
) -> nn.Module:
    """The whole model, computing in fp32 with its weights rounded to the bundle's dtype.

    Weights of large linear layers stay in their files (stored_weights.py).
    """
    model = build_shape(family, config, torch.float32)
    leaves = leaves_of(family)
    with_parameters(model, leaves, lambda name, _: checkpoint.read(stored_names[name]))
    return compute_in_fp32(model, rounding)
