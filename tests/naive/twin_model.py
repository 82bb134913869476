"""A model run by hand: transformers' own modules in a plain loop, one prompt, no padding.

Nothing here comes from lvlm. The checkpoint is loaded by ``from_pretrained``, images and text by
the checkpoint's own processor and tokenizer; attention is written out below. A ``Rule`` (see
twin_rules.py) is asked before every block whether the sequence gets shorter, and after every block
what of its cache stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    AttentionInterface,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

NAME = "lvlm-tests-naive"


@dataclass
class Seen:
    """One attention: queries [H,n,d] and keys [H,m,d] of every query head, rotary applied, and the
    probabilities [H,n,m]."""

    query: torch.Tensor
    key: torch.Tensor
    weights: torch.Tensor


@dataclass
class Sequence:
    """What enters a block: hidden [N,D], positions [1,N] ([3,N] with M-RoPE), whose image each
    token is (0: text)."""

    hidden: torch.Tensor
    positions: torch.Tensor
    image: list[int]


@dataclass
class Layer:
    """One block's cache in order of age: keys and values [Hkv,n,d], the most recent queries [H,q,d]
    and how many tokens were ever cached."""

    key: torch.Tensor
    value: torch.Tensor
    queries: torch.Tensor
    seen: int
    kept_of_prompt: int = 0


class Rule(Protocol):
    layer0: bool  # a new token's position is the length of the first block's cache

    def shorten(self, block: int, sequence: Sequence, before: Seen | None) -> Sequence: ...

    def after_prompt(self, block: int, layer: Layer, attention: Seen) -> None: ...

    def after_step(self, block: int, layer: Layer, step: int) -> None: ...


class _Entries:
    """Stands in for transformers' Cache: gives a block all keys and values there are."""

    def __init__(self, layer: Layer | None) -> None:
        self.layer = layer

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.layer is not None:
            key = torch.cat((self.layer.key[None], key), 2)
            value = torch.cat((self.layer.value[None], value), 2)
        self.key, self.value = key[0], value[0]
        return key, value


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    note: list[Seen] | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    del module
    groups = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    weights = torch.empty(query.shape[1], query.shape[2], key.shape[2])
    for head in range(query.shape[1]):
        logits = query[0, head] @ key[0, head // groups].T * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if attention_mask is not None:
            logits = logits + attention_mask
        weights[head] = logits.softmax(-1)
        out[0, head] = weights[head] @ value[0, head // groups]
    if note is not None:
        keys = torch.stack([key[0, h // groups] for h in range(query.shape[1])])
        note.append(Seen(query[0], keys, weights))
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _attention)


@dataclass
class Answer:
    """Greedy tokens, and the logits [vocabulary] that each was chosen by; of every block the tokens
    that entered it, the entries that the prompt left and those that are there at the end."""

    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    entered: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


class Twin:
    """A checkpoint whose images all give one run of tokens, numbered like text: LLaVA's."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()
        self.text = self.model.model.language_model
        self.text.config._attn_implementation = NAME
        self.images = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def answer(self, prompt: str, images: list[Any], rule: Rule, count: int) -> Answer:
        """``count`` greedy tokens to a prompt with its placeholders, past any end of text."""
        sequence = self._embed(prompt, images)
        # Behind an image these are not one number; each counts on, as in transformers' generate.
        following = sequence.positions[:, -1:] + 1
        found, layers, before = Answer(), [], None
        memories: dict[Any, Any] = {}  # of blocks that do not attend
        for block in self.text.layers:
            if not hasattr(block, "self_attn"):
                hidden, memories[block] = self._remember(block, sequence.hidden, None)
                sequence = Sequence(hidden, sequence.positions, sequence.image)
                continue
            index = len(layers)
            sequence = rule.shorten(index, sequence, before)
            hidden, before, entries = self._run(block, sequence, None)
            sequence = Sequence(hidden, sequence.positions, sequence.image)
            layer = Layer(entries.key, entries.value, before.query, len(hidden))
            found.entered.append(layer.seen)
            rule.after_prompt(index, layer, before)
            layer.kept_of_prompt = layer.key.shape[1]
            found.kept.append(layer.kept_of_prompt)
            layers.append(layer)
        hidden = sequence.hidden[-1:]
        for step in range(count):
            found.logits.append(self._logits(hidden)[0])
            found.tokens.append(int(found.logits[-1].argmax()))
            if step + 1 == count:
                break
            hidden = self.model.get_input_embeddings()(torch.tensor(found.tokens[-1:]))
            here = following + step
            if rule.layer0:
                here = torch.full_like(following, layers[0].key.shape[1])
            attending = iter(enumerate(layers))
            for block in self.text.layers:
                if block in memories:
                    hidden, memories[block] = self._remember(block, hidden, memories[block])
                    continue
                index, layer = next(attending)
                token = Sequence(hidden, here, [0])
                hidden, attention, entries = self._run(block, token, layer)
                layer.key, layer.value = entries.key, entries.value
                layer.queries = torch.cat((layer.queries, attention.query), 1)
                layer.seen += 1
                rule.after_step(index, layer, step + 1)
        found.lengths = [layer.key.shape[1] for layer in layers]
        return found

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[1,vocabulary] of the last block's output."""
        logits: torch.Tensor = self.model.lm_head(self.text.norm(hidden))
        return logits

    def _embed(self, prompt: str, images: list[Any]) -> Sequence:
        """What enters the first block."""
        token = self.model.config.image_token_id
        features = [self._features(image) for image in images]
        ids, rows, owner, number = [], [], [], 0
        for one in self.tokenizer(prompt).input_ids:
            if one == token:
                rows.append(features[number])
                number += 1
            else:
                rows.append(self.model.get_input_embeddings()(torch.tensor([one])))
            ids += [one] * len(rows[-1])
            owner += [number if one == token else 0] * len(rows[-1])
        assert number == len(images)
        positions = self._positions(torch.tensor(ids), torch.tensor(owner), images)
        return Sequence(torch.cat(rows), positions, owner)

    def _features(self, image: Any) -> torch.Tensor:
        """Of one image, [V,D]."""
        pixels = self.images(image, return_tensors="pt").pixel_values
        features: torch.Tensor = self.model.get_image_features(pixels).pooler_output[0]
        return features

    def _positions(self, ids: torch.Tensor, owner: torch.Tensor, images: list[Any]) -> torch.Tensor:
        """Those of the prompt's ``ids`` [N]."""
        del owner, images
        return torch.arange(len(ids))[None]

    def _run(
        self, block: Any, entering: Sequence, layer: Layer | None
    ) -> tuple[torch.Tensor, Seen, _Entries]:
        hidden, positions = entering.hidden[None], entering.positions
        place = positions if len(positions) == 1 else positions[:, None]
        entries, note = _Entries(layer), []
        out = block(
            hidden,
            attention_mask=self._mask(block, entering.image, layer),
            position_ids=place,
            position_embeddings=self._angles(block, hidden, place),
            past_key_values=entries,
            note=note,
        )
        out = out[0] if isinstance(out, tuple) else out
        return out[0], note[0], entries

    def _remember(
        self, block: Any, hidden: torch.Tensor, memory: Any | None
    ) -> tuple[torch.Tensor, Any]:
        """The output [n,D] of a block that does not attend, and what it remembers afterwards."""
        raise NotImplementedError

    def _angles(self, block: Any, hidden: torch.Tensor, place: torch.Tensor) -> Any:
        del block
        return self.text.rotary_emb(hidden, position_ids=place)

    def _mask(self, block: Any, image: list[int], layer: Layer | None) -> torch.Tensor | None:
        """What is added to logits, [n,m], where not everything is seen."""
        del block
        if layer is not None:
            return None
        return torch.full((len(image), len(image)), float("-inf")).triu(1)


class QwenTwin(Twin):
    """A Qwen-VL: as many tokens as an image is large, three positions per token."""

    def _features(self, image: Any) -> torch.Tensor:
        inputs = self.images(image, return_tensors="pt")
        found = self.model.get_image_features(inputs.pixel_values, inputs.image_grid_thw)
        features: torch.Tensor = found.pooler_output[0]
        return features

    def _positions(self, ids: torch.Tensor, owner: torch.Tensor, images: list[Any]) -> torch.Tensor:
        if not images:
            return torch.arange(len(ids)).expand(3, -1)
        grids = [self.images(p, return_tensors="pt").image_grid_thw for p in images]
        positions: torch.Tensor = self.model.model.get_rope_index(
            ids[None], mm_token_type_ids=(owner > 0).int()[None], image_grid_thw=torch.cat(grids)
        )[0]
        return positions[:, 0]
