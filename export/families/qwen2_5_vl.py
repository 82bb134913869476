"""Qwen2.5-VL: as Qwen2-VL, but most vision blocks attend in windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLAttention,
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLVisionAttention,
    Qwen2_5_VLVisionRotaryEmbedding,
)

from lvlm.core.errors import CheckpointError
from lvlm.export.families.parts.leaf_tables import layer_window, text_leaves
from lvlm.export.families.parts.llama_text import tiny, tiny_token
from lvlm.export.families.parts.qwen_vl_like import ROPES, QwenVL, tiny_preprocessor, tiny_text
from lvlm.export.leaves import Attention, Rotary, Table


class Qwen25VL(QwenVL):
    """See Family."""

    name = "qwen2.5-vl"
    aliases: ClassVar[Mapping[str, str]] = {
        "qwen2.5-vl": "Qwen/Qwen2.5-VL-3B-Instruct",
        "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    }
    model_types = ("qwen2_5_vl",)
    image_handling = "its own resolution"
    video = "pairs of frames, positions by time"
    text = text_leaves(
        Qwen2_5_VLRMSNorm, Qwen2_5_VLRotaryEmbedding, Qwen2_5_VLAttention, ROPES, layer_window
    )
    tower: ClassVar[Table] = {
        Qwen2_5_VLVisionRotaryEmbedding: Rotary(("axial",)),
        Qwen2_5_VLVisionAttention: Attention(),
    }
    config_class = Qwen2_5_VLConfig
    model_class = Qwen2_5_VLForConditionalGeneration

    def window(self, vision: Any) -> int:
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        if side < 1:
            raise CheckpointError(f"window_size {vision.window_size} is less than an image token")
        return int(side)

    def second(self, vision: Any) -> int:
        return int(vision.tokens_per_second)

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """GQA and MHA, patches and windows of two sizes, tied weights."""
        vision: dict[str, Any] = {"num_heads": 3, "hidden_size": 48, "out_hidden_size": 64}
        yield (
            "gqa",
            tiny(
                Qwen2_5_VLConfig,
                Qwen2_5_VLTextConfig(**tiny_text(layers=4, heads=4, kv_heads=1, section=[2, 3, 3])),
                Qwen2_5_VLVisionConfig(
                    **vision,
                    depth=3,
                    intermediate_size=80,
                    window_size=70,
                    fullatt_block_indexes=[1],
                ),
                image_token_id=3,
                video_token_id=tiny_token(0),
            ),
        )
        yield (
            "mha-tied",
            tiny(
                Qwen2_5_VLConfig,
                Qwen2_5_VLTextConfig(**tiny_text(layers=3, heads=2, kv_heads=2, section=[4, 6, 6])),
                Qwen2_5_VLVisionConfig(
                    **vision,
                    depth=2,
                    intermediate_size=56,
                    patch_size=10,
                    window_size=60,
                    fullatt_block_indexes=[1],
                ),
                image_token_id=3,
                video_token_id=tiny_token(0),
                tie_word_embeddings=True,
            ),
        )

    def tiny_files(self, config: Any) -> dict[str, str]:
        return tiny_preprocessor(config.vision_config)


FAMILY = Qwen25VL()
