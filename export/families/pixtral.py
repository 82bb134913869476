"""Pixtral: a vision tower for images of any size, LLaVA's projector, Mistral text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)

from lvlm.export.families.parts.leaf_tables import leaves
from lvlm.export.families.parts.llama_text import heads, one_of, tiny
from lvlm.export.families.parts.pixtral_like import (
    OWN_TEXTS,
    OWN_TOWERS,
    PixtralLike,
    PixtralVision,
)
from lvlm.export.leaves import Table


class Pixtral(PixtralLike):
    """See Family. Transformers has it as a LLaVA with another tower."""

    name = "pixtral"
    aliases: ClassVar[Mapping[str, str]] = {"pixtral": "mistral-community/pixtral-12b"}
    model_types = ("llava/pixtral",)
    leaves: ClassVar[Table] = leaves(OWN_TEXTS, OWN_TOWERS)
    config_class = LlavaConfig
    model_class = LlavaForConditionalGeneration
    text_type, tower_type, processor_class = "llama", "clip_vision_model", "LlavaProcessor"

    def merge(self, config: LlavaConfig) -> int:
        del config
        return 1

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        config = super().read_config(raw)
        # "default" leaves out a class token, which this tower has not
        chosen = config.vision_feature_select_strategy
        one_of(self.name, "vision_feature_select_strategy", chosen, ("full",))
        return config

    def vision(self, model: Any, config: LlavaConfig) -> nn.Module:
        return PlainVision(model, config)

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """GQA and MHA, heads wider than the hidden size's share, one feature layer and several,
        biases or none, tied weights."""
        size: dict[str, Any] = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 112}
        tower: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "hidden_act": "silu"}
        options = {"image_token_index": 3, "vision_feature_select_strategy": "full"}
        yield (
            "gqa",
            tiny(
                LlavaConfig,
                MistralConfig(**size, num_hidden_layers=4, **heads(4, 2, 24), sliding_window=None),
                PixtralVisionConfig(
                    **tower, num_hidden_layers=2, num_attention_heads=3, patch_size=16
                ),
                **options,
                vision_feature_layer=-1,
            ),
        )
        yield (
            "mha-layers-tied",
            tiny(
                LlavaConfig,
                MistralConfig(**size, num_hidden_layers=3, **heads(2, 2, 32), sliding_window=None),
                PixtralVisionConfig(
                    **tower, num_hidden_layers=3, num_attention_heads=4, patch_size=10
                ),
                **options,
                vision_feature_layer=[-2, 1],
                multimodal_projector_bias=False,
                tie_word_embeddings=True,
            ),
        )


class PlainVision(PixtralVision):
    """See PixtralVision: a token per patch."""

    def project(self, features: torch.Tensor) -> torch.Tensor:
        rows = self.projector(features.flatten(0, 1))
        assert isinstance(rows, torch.Tensor)
        return rows


FAMILY = Pixtral()
