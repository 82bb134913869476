"""Gemma 3's text model: its leaf modules, and rotary embeddings by the types of its layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3RMSNorm,
    Gemma3RotaryEmbedding,
    Gemma3TextScaledWordEmbedding,
)

from lvlm.export.families.parts.gemma_text import ScaledEmbedding
from lvlm.export.families.parts.leaf_tables import Kinds, layer_window
from lvlm.export.families.parts.llama_text import language_model
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.leaves import ZERO_CENTRED, Attention, HasLeaves, Rotary

TEXTS: Kinds = {
    "gemma3_text": {
        Gemma3TextScaledWordEmbedding: ScaledEmbedding(),
        Gemma3RMSNorm: ZERO_CENTRED,
        Gemma3RotaryEmbedding: Rotary(),
        Gemma3Attention: Attention(layer_window),
    }
}


def gemma3_text(family: HasLeaves, parts: Any, head: nn.Module, text: Any) -> LanguageModel:
    """The language model, each layer with the angles of its type."""
    found = language_model(family, parts, head, text)
    rotaries = {kind: OfLayers(parts.rotary_emb, kind) for kind in dict.fromkeys(text.layer_types)}
    layers = [
        replace(layer, rotary=rotaries[kind])
        for layer, kind in zip(found.layers, text.layer_types, strict=True)
    ]
    return replace(found, layers=layers)


class OfLayers(nn.Module):
    """The rotary embedding of layers of one type."""

    def __init__(self, rotary: nn.Module, kind: str) -> None:
        super().__init__()
        self.rotary, self.kind = rotary, kind

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.rotary(x, position_ids, self.kind)
