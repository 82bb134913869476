"""Parts that Qwen3-VL and Qwen3.5 share: learned positions stretched over an image, rotary
positions in turns, videos with their time in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lvlm.export.families.parts.mrope import taking_turns
from lvlm.export.families.parts.qwen_vision import VisionAngles, patches, run_block
from lvlm.export.families.parts.qwen_vl_like import QwenVL, tiny_preprocessor


class Qwen3Like(QwenVL):
    """See Family; a subclass per transformers class."""

    image_handling = "its own resolution"
    video = "pairs of frames, with their time"
    timed = True

    def table(self, vision: Any) -> int:
        return int(vision.num_position_embeddings**0.5)

    def axis(self, rotary: Any, shares: Sequence[int]) -> torch.Tensor:
        return taking_turns(shares, len(rotary.inv_freq))

    def vision(self, model: Any, config: Any) -> nn.Module:
        return Qwen3Vision(model, getattr(config.vision_config, "deepstack_visual_indexes", ()))

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

    def __init__(self, model: Any, deepstack: Sequence[int]) -> None:
        super().__init__()
        self.visual, self.deepstack = model.model.visual, list(deepstack)

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
            if layer in self.deepstack:
                merger = self.deepstack.index(layer)
                deepstack.append(visual.deepstack_merger_list[merger](hidden))
        return torch.cat([visual.merger(hidden), *deepstack], dim=-1)
