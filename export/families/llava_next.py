"""LLaVA-NeXT (LLaVA 1.6): images of any shape as tiles, a newline after each line of patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

from lvlm.export.families.parts.llama_text import heads, preprocessor, tiny
from lvlm.export.families.parts.llava_like import AnyResolution, tiny_preprocessor
from lvlm.runtime.processors.llava_next import normalise_config


class LlavaNext(AnyResolution):
    """See Family."""

    name = "llava-next"
    aliases: ClassVar[Mapping[str, str]] = {
        "llava-next": "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava-next-vicuna": "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava-next-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    }
    model_types = ("llava_next",)
    image_handling = "tiles, and the whole as one more"
    video = ""
    config_class = LlavaNextConfig
    model_class = LlavaNextForConditionalGeneration
    tower_type, text_type = "clip_vision_model", "llama"

    def processor(self, config: LlavaNextConfig, folder: Path) -> dict[str, Any]:
        side = config.vision_config.image_size
        patches = side // config.vision_config.patch_size
        return normalise_config(preprocessor(folder), side, patches)

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """GQA and MHA, one and several feature layers, tiles of two sizes, biases."""
        size: dict[str, Any] = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 112}
        tower: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
        yield (
            "mistral-gqa",
            tiny(
                LlavaNextConfig,
                MistralConfig(**size, num_hidden_layers=4, **heads(4, 2, 32), sliding_window=None),
                CLIPVisionConfig(
                    **tower,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    image_size=56,
                    patch_size=14,
                ),
                image_token_index=3,
                image_grid_pinpoints=[[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
            ),
        )
        yield (
            "llama-mha-layers",
            tiny(
                LlavaNextConfig,
                LlamaConfig(**size, num_hidden_layers=2, **heads(2, 2, 64), attention_bias=True),
                CLIPVisionConfig(
                    **tower,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    image_size=60,
                    patch_size=12,
                ),
                image_token_index=3,
                image_grid_pinpoints=[[60, 120], [60, 180], [120, 60]],
                vision_feature_layer=[-2, 1],
                multimodal_projector_bias=False,
            ),
        )

    def tiny_files(self, config: LlavaNextConfig) -> dict[str, str]:
        return tiny_preprocessor("LlavaNextImageProcessor", config)


FAMILY = LlavaNext()
