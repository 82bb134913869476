"""Inputs of the first block: tokens' embeddings, with image features in place of placeholders."""

from __future__ import annotations

import torch
from torch import nn

from lvlm.export.graphs.graph import Tensors
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.ports import BATCH, GraphPort


def new_tokens(model: LanguageModel, features: torch.dtype) -> list[GraphPort]:
    """Inputs of a graph that reads tokens behind what is cached; ``features`` is the images'."""
    row = (BATCH, "tokens")
    positions = row if model.position_rows == 1 else (3, *row)
    return [
        GraphPort("input_ids", torch.int64, row),
        GraphPort("image_features", features, ("rows", model.feature_width)),
        GraphPort("image_row", torch.int64, row),
        GraphPort("position_ids", torch.int64, positions),
        GraphPort("last_token", torch.int64, (BATCH,)),
    ]


class EmbeddedTokens:
    """``hidden`` [B,N,D] of a graph's input_ids [B,N], image_row [B,N] (-1: no placeholder) and
    image_features [R,(1+deepstack_layers)*D]; with DeepStack also what the first blocks' outputs
    get."""

    def __init__(self, model: LanguageModel, given: Tensors) -> None:
        rows = given["image_row"]
        features = nn.functional.embedding(rows.clamp(min=0), given["image_features"])
        self._image = (rows >= 0)[..., None]
        first, *self._deepstack = (
            torch.split(features, model.hidden, dim=-1) if model.deepstack_layers else [features]
        )
        self.hidden = torch.where(self._image, first, model.embed(given["input_ids"]))

    def with_features(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output [B,N,D] of block ``layer`` with the image features that it gets."""
        if layer >= len(self._deepstack):
            return hidden
        return hidden + torch.where(self._image, self._deepstack[layer], 0)
