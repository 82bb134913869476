"""Mistral 3, as Mistral Small 3.1: Pixtral's tower, patches merged two by two, Mistral text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)
from transformers.models.mistral3.modeling_mistral3 import Mistral3RMSNorm

from lvlm.core.errors import CheckpointError
from lvlm.export.families.parts.leaf_tables import leaves
from lvlm.export.families.parts.llama_text import heads, tiny
from lvlm.export.families.parts.pixtral_like import (
    OWN_TEXTS,
    OWN_TOWERS,
    PROCESSOR,
    PixtralLike,
    PixtralVision,
)
from lvlm.export.leaves import RMS_NORM, Table


class Mistral3(PixtralLike):
    """See Family."""

    name = "mistral3"
    aliases: ClassVar[Mapping[str, str]] = {
        "mistral-small-3.1": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    }
    model_types = ("mistral3",)
    leaves: ClassVar[Table] = {**leaves(OWN_TEXTS, OWN_TOWERS), Mistral3RMSNorm: RMS_NORM}
    config_class = Mistral3Config
    model_class = Mistral3ForConditionalGeneration
    text_type, tower_type, processor_class = "mistral", "pixtral", PROCESSOR

    def merge(self, config: Mistral3Config) -> int:
        return int(config.spatial_merge_size)

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        config = super().read_config(raw)
        if not isinstance(config.vision_feature_layer, int):
            raise CheckpointError(
                f"vision_feature_layer {config.vision_feature_layer} is not supported: the norm of "
                "this projector is as wide as one layer's features; give one number"
            )
        return config

    def vision(self, model: Any, config: Mistral3Config) -> nn.Module:
        return Mistral3Vision(model, config)

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """GQA and MHA, heads wider than the hidden size's share, merges and patches of two sizes,
        two feature layers, biases, tied weights."""
        size: dict[str, Any] = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 112}
        tower: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "hidden_act": "silu"}
        yield (
            "gqa",
            tiny(
                Mistral3Config,
                MistralConfig(**size, num_hidden_layers=4, **heads(4, 2, 24), sliding_window=None),
                PixtralVisionConfig(
                    **tower, num_hidden_layers=2, num_attention_heads=3, patch_size=8
                ),
                image_token_index=3,
            ),
        )
        yield (
            "mha-bias-tied",
            tiny(
                Mistral3Config,
                MistralConfig(**size, num_hidden_layers=3, **heads(2, 2, 32), sliding_window=None),
                PixtralVisionConfig(
                    **tower, num_hidden_layers=3, num_attention_heads=4, patch_size=5
                ),
                image_token_index=3,
                spatial_merge_size=3,
                vision_feature_layer=-2,
                multimodal_projector_bias=True,
                tie_word_embeddings=True,
            ),
        )


class Mistral3Vision(PixtralVision):
    """See PixtralVision: the features of a token's patches become one, then the projection."""

    def project(self, features: torch.Tensor) -> torch.Tensor:
        projector = self.projector
        # As transformers' unfold has them: of each number those of all patches
        patches = projector.norm(features).transpose(1, 2).flatten(1)
        merged = projector.patch_merger.merging_layer(patches)
        rows = projector.linear_2(projector.act(projector.linear_1(merged)))
        assert isinstance(rows, torch.Tensor)
        return rows


FAMILY = Mistral3()
