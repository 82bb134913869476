"""lightvlm's merging as plain loops, from its definition (docs/recipes.md), over any cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from twin_model import Layer, Seen, Sequence
from twin_rules import FixedPoint, NoRule, ranked, rounded


@dataclass
class Pyramid(NoRule):
    """Merging over the cache rule ``cache``; ``fractions`` of an image that are left after each of
    the ``stages``, ``absorb`` and ``recycle`` of merge=recycle and illava."""

    fractions: list[float]
    stages: list[int]
    cache: NoRule
    importance: str = "text"
    merge: str = "recycle"
    recycle: float | None = None
    absorb: int = 5
    tokens: list[int] = field(default_factory=list)  # of each image at the start

    @property
    def layer0(self) -> bool:  # type: ignore[override]
        return self.cache.layer0

    def shorten(self, block: int, sequence: Sequence, before: Seen | None) -> Sequence:
        if block == 0:
            self._count(sequence.image)
        if block not in self.stages:
            return self.cache.shorten(block, sequence, before)
        assert before is not None
        paid = self._paid(sequence.image, before)
        hidden = sequence.hidden.clone()
        gone: set[int] = set()
        for image, tokens in enumerate(self.tokens, 1):
            places = [p for p, owner in enumerate(sequence.image) if owner == image]
            order = [places[i] for i in ranked([paid[p] for p in places])]
            last = len(sequence.image) - 1
            if last in order:  # decides the answer: never given up
                order = [last, *(p for p in order if p != last)]
            left = self._left(tokens, block)
            gone |= set(order[left:])
            if self.merge != "drop":
                self._absorb(sequence.hidden, hidden, order[:left], sorted(order[left:]), paid)
        stay = [p for p in range(len(hidden)) if p not in gone]
        owners = [sequence.image[p] for p in stay]
        shorter = Sequence(hidden[stay], sequence.positions[:, stay], owners)
        return self.cache.shorten(block, shorter, before)

    def _count(self, owners: list[int]) -> None:
        self.tokens = [owners.count(image) for image in range(1, max(owners) + 1)]
        if isinstance(self.cache, FixedPoint) and self.cache.shares is not None:
            text, layers = owners.count(0), range(len(self.cache.shares))
            self.cache.entered = [
                text + sum(self._left(n, layer) for n in self.tokens) for layer in layers
            ]

    def _left(self, tokens: int, block: int) -> int:
        """Of an image of ``tokens``, how many enter a block."""
        done = sum(stage <= block for stage in self.stages)
        return max(1, rounded(tokens * self.fractions[done - 1])) if done else tokens

    def _paid(self, owners: list[int], before: Seen) -> list[float]:
        """What the queries that count pay every token, the mean over heads and queries."""
        last = text = [len(owners) - 1]
        if owners[-1] == 0 and max(owners) > 0:
            after = max(p for p, owner in enumerate(owners) if owner > 0) + 1
            text = list(range(after, len(owners)))[-64:]
        chosen = {"last": [last], "text": [text], "both": [last, text]}[self.importance]
        paid = [before.weights[:, asking].double().mean((0, 1)) for asking in chosen]
        found: list[float] = (sum(paid[1:], start=paid[0]) / len(paid)).tolist()
        return found

    def _absorb(
        self,
        old: torch.Tensor,
        new: torch.Tensor,
        stay: list[int],
        loose: list[int],
        paid: list[float],
    ) -> None:
        centres = list(stay)
        if self.merge in ("recycle", "illava"):
            if len(stay) < 2:
                return
            part = self.recycle or {"recycle": 0.1, "illava": 0.05}[self.merge]
            centres = stay[-max(1, rounded(part * len(stay))) :]
        if self.merge == "illava":
            self._share(old, new, centres, loose)
            return
        claimed: dict[int, list[tuple[float, int]]] = {c: [] for c in centres}
        for token in loose:
            likeness = [float(torch.cosine_similarity(old[token], old[c], dim=0)) for c in centres]
            best = ranked(likeness)[0]
            claimed[centres[best]].append((-likeness[best], token))
        for centre, tokens in claimed.items():
            taken = sorted(tokens)[: self.absorb] if self.merge == "recycle" else tokens
            if not taken:
                continue
            members = [centre, *(token for _, token in taken)]
            weights = torch.tensor([paid[m] for m in members])
            if float(weights.sum()) == 0:
                weights = torch.ones(len(members))
            new[centre] = (weights[:, None] * old[members]).sum(0) / weights.sum()

    def _share(
        self, old: torch.Tensor, new: torch.Tensor, centres: list[int], loose: list[int]
    ) -> None:
        """iLLaVA's: each centre its own nearest by dot product, whoever else takes them."""
        for centre in centres:
            likeness = [float(old[token] @ old[centre]) for token in loose]
            taken = ranked(likeness)[: self.absorb]
            if not taken:
                continue
            scaled = torch.tensor([likeness[i] for i in taken]) / old.shape[1] ** 0.5
            mean = scaled.softmax(0) @ old[[loose[i] for i in taken]]
            new[centre] = (old[centre] + mean) / 2

    def after_prompt(self, block: int, layer: Layer, attention: Seen) -> None:
        self.cache.after_prompt(block, layer, attention)

    def after_step(self, block: int, layer: Layer, step: int) -> None:
        self.cache.after_step(block, layer, step)
