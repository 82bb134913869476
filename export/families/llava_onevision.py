"""LLaVA-OneVision: one image as many tiles, shrunk by interpolation, or several as one each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from lvlm.core.errors import CheckpointError
from lvlm.export.families.parts.llama_text import (
    heads,
    preprocessor,
    tiny,
    tiny_token,
    tiny_tokenizer,
    token_text,
    video_preprocessor,
)
from lvlm.export.families.parts.llava_like import AnyResolution, tiny_preprocessor
from lvlm.runtime.processors.llava_onevision import normalise_config
from lvlm.runtime.processors.parts.frames import attempted
from lvlm.runtime.processors.parts.llava_onevision_video import video_config
from lvlm.runtime.prompt.prompts import Prompt

ASPECT = re.compile(r"anyres_max_([1-9][0-9]{0,2})")


class LlavaOnevision(AnyResolution):
    """See Family."""

    name = "llava-onevision"
    aliases: ClassVar[Mapping[str, str]] = {
        "llava-onevision": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    }
    model_types = ("llava_onevision",)
    image_handling = "alone: tiles, and the whole as one more; several: a tile each"
    video = "a tile per frame, pooled"
    config_class = LlavaOnevisionConfig
    model_class = LlavaOnevisionForConditionalGeneration
    tower_type, text_type = "siglip_vision_model", "qwen2"

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        config = super().read_config(raw)
        if not ASPECT.fullmatch(config.vision_aspect_ratio):
            raise CheckpointError(
                f"vision_aspect_ratio '{config.vision_aspect_ratio}' is not supported; family "
                f"{self.name} has anyres_max_N"
            )
        return config

    def processor(self, config: LlavaOnevisionConfig, folder: Path) -> dict[str, Any]:
        side = config.vision_config.image_size
        patches = side // config.vision_config.patch_size
        aspect = ASPECT.fullmatch(config.vision_aspect_ratio)
        assert aspect is not None
        token_id = config.video_token_id
        video = attempted(
            lambda: video_config(
                video_preprocessor(folder),
                token_text(folder, token_id),
                token_id,
                token_text(folder, config.image_token_id),
                side,
            )
        )
        return normalise_config(preprocessor(folder), side, patches, int(aspect[1]), video)

    def transformers_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        found = super().transformers_inputs(prompt)
        return found and found | {"batch_num_images": torch.tensor([len(prompt.images)])}

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """GQA and MHA, both towers, more tiles than fit (interpolation), tied weights."""
        size: dict[str, Any] = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 112}
        tower: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
        yield (
            "qwen2-gqa-tied-siglip",
            tiny(
                LlavaOnevisionConfig,
                Qwen2Config(**size, num_hidden_layers=4, **heads(4, 1, 16)),
                SiglipVisionConfig(
                    **tower,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    image_size=60,
                    patch_size=12,
                    vision_use_head=False,
                ),
                image_token_index=3,
                video_token_index=tiny_token(0),
                image_grid_pinpoints=[[60, 120], [120, 60], [120, 120], [120, 180], [180, 120]],
                vision_aspect_ratio="anyres_max_2",
                tie_word_embeddings=True,
            ),
        )
        yield (
            "llama-mha-clip",
            tiny(
                LlavaOnevisionConfig,
                LlamaConfig(**size, num_hidden_layers=3, **heads(2, 2, 32)),
                CLIPVisionConfig(
                    **tower,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    image_size=56,
                    patch_size=14,
                ),
                image_token_index=3,
                video_token_index=tiny_token(0),
                image_grid_pinpoints=[[56, 56], [56, 112], [112, 56], [112, 112], [168, 168]],
                vision_aspect_ratio="anyres_max_4",
                vision_feature_layer=[-2, -1],
                vision_feature_select_strategy="default",
            ),
        )

    def tiny_files(self, config: LlavaOnevisionConfig) -> dict[str, str]:
        files = tiny_preprocessor("LlavaOnevisionImageProcessor", config)
        side = config.vision_config.image_size
        video = {"size": {"height": side, "width": side}}
        return files | {
            "video_preprocessor_config.json": json.dumps(video),
            "tokenizer.json": tiny_tokenizer("<video>"),
        }


FAMILY = LlavaOnevision()
