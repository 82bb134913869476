"""Qwen2-VL: images at their own resolution, attention over the whole image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.configuration_qwen2_vl import (
    Qwen2VLTextConfig,
    Qwen2VLVisionConfig,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLAttention,
    Qwen2VLRMSNorm,
    Qwen2VLRotaryEmbedding,
    Qwen2VLVisionRotaryEmbedding,
    VisionAttention,
)

from lvlm.export.families.parts.leaf_tables import layer_window, text_leaves
from lvlm.export.families.parts.llama_text import tiny, tiny_token
from lvlm.export.families.parts.qwen_vl_like import ROPES, QwenVL, tiny_preprocessor, tiny_text
from lvlm.export.leaves import Attention, Rotary, Table


class Qwen2VL(QwenVL):
    """See Family."""

    name = "qwen2-vl"
    aliases: ClassVar[Mapping[str, str]] = {
        "qwen2-vl": "Qwen/Qwen2-VL-2B-Instruct",
        "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct",
    }
    model_types = ("qwen2_vl",)
    image_handling = "its own resolution"
    video = "pairs of frames"
    text = text_leaves(
        Qwen2VLRMSNorm, Qwen2VLRotaryEmbedding, Qwen2VLAttention, ROPES, layer_window
    )
    tower: ClassVar[Table] = {
        Qwen2VLVisionRotaryEmbedding: Rotary(("axial",)),
        VisionAttention: Attention(),
    }
    config_class = Qwen2VLConfig
    model_class = Qwen2VLForConditionalGeneration

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """GQA and MHA, patches of two sizes, tied weights."""
        vision: dict[str, Any] = {"embed_dim": 48, "num_heads": 3, "hidden_size": 64}
        yield (
            "gqa",
            tiny(
                Qwen2VLConfig,
                Qwen2VLTextConfig(**tiny_text(layers=4, heads=4, kv_heads=2, section=[2, 3, 3])),
                Qwen2VLVisionConfig(**vision, depth=2, mlp_ratio=2),
                image_token_id=3,
                video_token_id=tiny_token(0),
            ),
        )
        yield (
            "mha-tied",
            tiny(
                Qwen2VLConfig,
                Qwen2VLTextConfig(**tiny_text(layers=3, heads=2, kv_heads=2, section=[4, 6, 6])),
                Qwen2VLVisionConfig(**vision, depth=3, mlp_ratio=1, patch_size=10),
                image_token_id=3,
                video_token_id=tiny_token(0),
                tie_word_embeddings=True,
            ),
        )

    def tiny_files(self, config: Any) -> dict[str, str]:
        return tiny_preprocessor(config.vision_config)


FAMILY = Qwen2VL()
