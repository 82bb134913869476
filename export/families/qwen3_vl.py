"""Qwen3-VL: learned positions stretched over the image, and DeepStack: features of several vision
blocks, which the language model's first blocks add to what they give."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn
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
from lvlm.export.families.parts.mrope import taking_turns
from lvlm.export.families.parts.qwen_vision import VisionAngles, patches, run_block
from lvlm.export.families.parts.qwen_vl_like import ROPES, QwenVL, tiny_preprocessor, tiny_text
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.leaves import Attention, Rotary, Table


class Qwen3VL(QwenVL):
    """See Family."""

    name = "qwen3-vl"
    aliases: ClassVar[Mapping[str, str]] = {
        "qwen3-vl": "Qwen/Qwen3-VL-2B-Instruct",
        "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    }
    model_types = ("qwen3_vl",)
    image_handling = "its own resolution"
    video = "pairs of frames, with their time"
    text = text_leaves(Qwen3VLTextRMSNorm, Qwen3VLTextRotaryEmbedding, Qwen3VLTextAttention, ROPES)
    tower: ClassVar[Table] = {
        Qwen3VLVisionRotaryEmbedding: Rotary(("axial",)),
        Qwen3VLVisionAttention: Attention(),
    }
    config_class = Qwen3VLConfig
    model_class = Qwen3VLForConditionalGeneration
    timed = True
    default_section = (24, 20, 20)

    def table(self, vision: Any) -> int:
        return int(vision.num_position_embeddings**0.5)

    def language(self, model: Any, config: Any) -> LanguageModel:
        found = super().language(model, config)
        deepstack = len(config.vision_config.deepstack_visual_indexes)
        return replace(found, deepstack_layers=deepstack)

    def axis(self, rotary: Any, shares: Sequence[int]) -> torch.Tensor:
        return taking_turns(shares, len(rotary.inv_freq))

    def vision(self, model: Any, config: Any) -> nn.Module:
        del config
        return Qwen3Vision(model)

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

    def tiny_files(self, config: Any) -> dict[str, str]:
        vision = config.vision_config
        token = (vision.patch_size * vision.spatial_merge_size) ** 2
        video = {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "size": {"shortest_edge": 4 * token, "longest_edge": 60 * token},
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }
        files = {"video_preprocessor_config.json": json.dumps(video)}
        return tiny_preprocessor(vision) | files


class Qwen3Vision(nn.Module):
    """Patches of one image to image tokens and to what the language model's blocks add to them.

    pixel_values [V,p,3*frames*patch*patch] fp32, position_ids [V,p,2] int64: V tokens of p patches
    learned       [V,p,4] int64: learned positions around each patch; share [V,p,4] fp32 of each
    -> [V,(1+deepstack_layers)*D]
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual = model.model.visual

    def forward(
        self,
        pixel_values: torch.Tensor,
        position_ids: torch.Tensor,
        learned: torch.Tensor,
        share: torch.Tensor,
    ) -> torch.Tensor:
        visual = self.visual
        hidden = patches(visual, pixel_values)
        around = nn.functional.embedding(learned, visual.pos_embed.weight)
        hidden = hidden + (around * share[..., None]).sum(2).to(hidden.dtype)
        angles = VisionAngles.of(visual, hidden, position_ids)
        deepstack = []
        for layer, block in enumerate(visual.blocks):
            hidden = run_block(block, hidden, angles)
            if layer in visual.deepstack_visual_indexes:
                merger = visual.deepstack_visual_indexes.index(layer)
                deepstack.append(visual.deepstack_merger_list[merger](hidden))
        return torch.cat([visual.merger(hidden), *deepstack], dim=-1)


FAMILY = Qwen3VL()
