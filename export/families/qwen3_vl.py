"""Qwen3-VL: learned positions stretched over the image, and DeepStack: features of several vision
blocks, which the language model's first blocks add to what they give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.configuration_qwen3_vl import (
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextAttention,
    Qwen3VLTextRMSNorm,
    Qwen3VLTextRotaryEmbedding,
    Qwen3VLVisionAttention,
    Qwen3VLVisionRotaryEmbedding,
)

from lvlm.export.families.parts.leaf_tables import text_leaves
from lvlm.export.families.parts.llama_text import tiny, tiny_token
from lvlm.export.families.parts.qwen3_vl_like import Qwen3Like
from lvlm.export.families.parts.qwen_vl_like import ROPES, tiny_text
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.leaves import Attention, Rotary, Table


class Qwen3VL(Qwen3Like):
    """See Family."""

    name = "qwen3-vl"
    aliases: ClassVar[Mapping[str, str]] = {
        "qwen3-vl": "Qwen/Qwen3-VL-2B-Instruct",
        "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    }
    model_types = ("qwen3_vl",)
    text = text_leaves(Qwen3VLTextRMSNorm, Qwen3VLTextRotaryEmbedding, Qwen3VLTextAttention, ROPES)
    tower: ClassVar[Table] = {
        Qwen3VLVisionRotaryEmbedding: Rotary(("axial",)),
        Qwen3VLVisionAttention: Attention(),
    }
    config_class = Qwen3VLConfig
    model_class = Qwen3VLForConditionalGeneration
    default_section = (24, 20, 20)

    def language(self, model: Any, config: Any) -> LanguageModel:
        found = super().language(model, config)
        deepstack = len(config.vision_config.deepstack_visual_indexes)
        return replace(found, deepstack_layers=deepstack)

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """GQA and MHA, one and two DeepStack layers, patches of two sizes, tied weights."""
        vision: dict[str, Any] = {"num_heads": 3, "hidden_size": 48, "out_hidden_size": 64}
        yield (
            "gqa",
            tiny(
                Qwen3VLConfig,
                Qwen3VLTextConfig(
                    **tiny_text(layers=4, heads=4, kv_heads=2, section=[8, 4, 4]), head_dim=32
                ),
                Qwen3VLVisionConfig(
                    **vision,
                    depth=2,
                    intermediate_size=80,
                    num_position_embeddings=64,
                    deepstack_visual_indexes=[0],
                ),
                image_token_id=3,
                video_token_id=tiny_token(0),
            ),
        )
        yield (
            "mha-tied",
            tiny(
                Qwen3VLConfig,
                Qwen3VLTextConfig(
                    **tiny_text(layers=6, heads=2, kv_heads=2, section=[4, 2, 2]), head_dim=16
                ),
                Qwen3VLVisionConfig(
                    **vision,
                    depth=3,
                    intermediate_size=56,
                    patch_size=10,
                    num_position_embeddings=25,
                    deepstack_visual_indexes=[0, 2],
                ),
                image_token_id=3,
                video_token_id=tiny_token(0),
                tie_word_embeddings=True,
            ),
        )


FAMILY = Qwen3VL()
