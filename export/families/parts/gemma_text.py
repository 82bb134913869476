"""Gemma's text models, the first and the second: their leaf modules, and what the later ones
share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.gemma.modeling_gemma import (
    GemmaAttention,
    GemmaRMSNorm,
    GemmaRotaryEmbedding,
    GemmaTextScaledWordEmbedding,
)
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2Attention,
    Gemma2RMSNorm,
    Gemma2RotaryEmbedding,
    Gemma2TextScaledWordEmbedding,
)

from lvlm.export.families.parts.leaf_tables import Kinds, layer_window
from lvlm.export.leaves import ZERO_CENTRED, Attention, Leaf, Rotary


class ScaledEmbedding(Leaf):
    """Embeddings of words times a constant, which those of images are not."""

    def buffers(self, module: Any) -> Mapping[str, torch.Tensor]:
        return {"embed_scale": torch.tensor(module.scalar_embed_scale)}


TEXTS: Kinds = {
    "gemma": {
        GemmaTextScaledWordEmbedding: ScaledEmbedding(),
        GemmaRMSNorm: ZERO_CENTRED,
        GemmaRotaryEmbedding: Rotary(),
        GemmaAttention: Attention(),
    },
    "gemma2": {
        Gemma2TextScaledWordEmbedding: ScaledEmbedding(),
        Gemma2RMSNorm: ZERO_CENTRED,
        Gemma2RotaryEmbedding: Rotary(),
        Gemma2Attention: Attention(layer_window),
    },
}
