"""A family that the project does not have: LLaVA on Gemma 3's text model, whose layers take turns
with two rotary embeddings and with a window. Nothing but this file knows of it, and it uses nothing
of the project's own Gemma 3: it is what a package would write for leaf modules of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import CLIPVisionConfig, Gemma3TextConfig, LlavaConfig
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3RMSNorm,
    Gemma3RotaryEmbedding,
    Gemma3TextScaledWordEmbedding,
)

from lvlm.export.families.llava import Llava
from lvlm.export.families.parts.leaf_tables import Kinds, layer_window, leaves
from lvlm.export.families.parts.llama_text import heads, read_common, tiny
from lvlm.export.families.parts.llava_like import TOWERS
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.leaves import Attention, Leaf, Norm, Rotary
from lvlm.export.standard_ops import rms_normalization

WINDOW = 20


class Scaled(Leaf):
    """Embeddings times a constant."""

    def buffers(self, module: Any) -> Mapping[str, torch.Tensor]:
        return {"embed_scale": torch.tensor(module.scalar_embed_scale)}


def norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """A weight of 0 scales by 1."""
    return rms_normalization(hidden, 1.0 + module.weight, module.eps)


TEXTS: Kinds = {
    "gemma3_text": {
        Gemma3TextScaledWordEmbedding: Scaled(),
        Gemma3RMSNorm: Norm(norm),
        Gemma3RotaryEmbedding: Rotary(),
        Gemma3Attention: Attention(layer_window),
    }
}


class OneKind(nn.Module):
    """Gemma's rotary embedding for the layers of one type."""

    def __init__(self, rotary: nn.Module, kind: str) -> None:
        super().__init__()
        self.rotary, self.kind = rotary, kind

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.rotary(x, position_ids, self.kind)


class LlavaGemma(Llava):
    """See Family."""

    name = "llava-gemma"
    aliases: ClassVar[Mapping[str, str]] = {}
    model_types = ("llava_gemma",)
    leaves = leaves(TEXTS, TOWERS)

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        known = {**raw, "model_type": "llava"}
        return read_common(
            self.name, LlavaConfig, known, TEXTS, "gemma3_text", TOWERS, "clip_vision_model"
        )

    def language(self, model: Any, config: LlavaConfig) -> LanguageModel:
        found = super().language(model, config)
        kinds = config.text_config.layer_types
        rotaries = {kind: OneKind(found.rotaries[0], kind) for kind in kinds}
        layers = [
            replace(layer, rotary=rotaries[kind])
            for layer, kind in zip(found.layers, kinds, strict=True)
        ]
        return replace(found, layers=layers)

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """Layers with a window around those without."""
        text = Gemma3TextConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=4,
            **heads(4, 2, 16),
            query_pre_attn_scalar=16,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            },
        )
        clip = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        )
        yield "turns", tiny(LlavaConfig, text, clip, image_token_index=3, vision_feature_layer=-1)


FAMILY = LlavaGemma()
