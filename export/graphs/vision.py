"""The graph ``vision``: the arrays of an image to the rows that replace its placeholders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lvlm.export.graphs.graph import BundleGraph, Tensors
from lvlm.export.ports import GraphPort


class Vision(BundleGraph):
    """A family's vision tower; its inputs are the arrays that the image's processor makes.

    Args:
        tower: takes the inputs by their names.
        inputs: as the family declares them.
        width: numbers per image token.
        dtype: of these, as of the weights.
        scores: numbers per token that the tower's ``scored`` gives besides; 0: they are not asked
            for.
    """

    name = "vision"

    def __init__(
        self,
        tower: nn.Module,
        inputs: Sequence[GraphPort],
        width: int,
        dtype: torch.dtype,
        scores: int = 0,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.arrays, self.width, self.dtype, self.scores = list(inputs), width, dtype, scores

    def inputs(self) -> list[GraphPort]:
        return self.arrays

    def outputs(self) -> list[GraphPort]:
        ports = [GraphPort("image_features", self.dtype, ("rows", self.width))]
        if self.scores:
            ports.append(GraphPort("image_scores", torch.float32, ("rows", self.scores)))
        return ports

    def compute(self, given: Tensors) -> dict[str, torch.Tensor]:
        if not self.scores:
            return {"image_features": self.tower(**given)}
        features, scores = self.tower.scored(**given)  # type: ignore[operator]
        return {"image_features": features, "image_scores": scores.float()}
