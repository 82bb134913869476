"""LLaVA 1.5 and its kin: CLIP or SigLIP tower, projector, Llama, Mistral or Qwen2 text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from lvlm.export.families.family import fixed_tokens
from lvlm.export.families.parts.feature_layers import feature_layers
from lvlm.export.families.parts.leaf_tables import TEXTS
from lvlm.export.families.parts.llama_text import (
    heads,
    language_model,
    preprocessor,
    read_common,
    tiny,
    token_text,
)
from lvlm.export.families.parts.llava_like import (
    LEAVES,
    TOWERS,
    LlavaVision,
    rows_dropped,
    tile_tokens,
)
from lvlm.export.families.parts.pixel_values import PixelValues
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.processors.llava import normalise_config


class Llava(PixelValues):
    """See Family. One pooled feature per patch, so every image has the same number of tokens."""

    name = "llava"
    aliases: ClassVar[Mapping[str, str]] = {
        "llava": "llava-hf/llava-1.5-7b-hf",
        "llava-13b": "llava-hf/llava-1.5-13b-hf",
    }
    model_types = ("llava",)
    image_handling = "one size, the same tokens for all"
    video = ""
    leaves = LEAVES
    model_class = LlavaForConditionalGeneration

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        config = read_common(
            self.name, LlavaConfig, raw, TEXTS, "llama", TOWERS, "clip_vision_model"
        )
        feature_layers(config)
        return config

    def language(self, model: Any, config: LlavaConfig) -> LanguageModel:
        return language_model(self, model.model.language_model, model.lm_head, config.text_config)

    def vision(self, model: Any, config: LlavaConfig) -> nn.Module:
        return LlavaVision(model, feature_layers(config), rows_dropped(config))

    def images(self, config: LlavaConfig, folder: Path) -> Images:
        vision = config.vision_config
        side, tokens = vision.image_size // vision.patch_size, tile_tokens(config)
        return Images(
            token=token_text(folder, config.image_token_id),
            token_id=config.image_token_id,
            tokens=tokens,
            grid=(side, side),
            size=(vision.image_size, vision.image_size),
            processor=normalise_config(preprocessor(folder), tokens),
        )

    def bounded(self, images: Images, tokens: int) -> Images:
        raise fixed_tokens(images, tokens)

    def tiny_configs(self) -> Iterator[tuple[str, LlavaConfig]]:
        """Every text backbone, both towers, both strategies, GQA and MHA, biases, tied weights."""
        clip = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        )
        siglip = SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=60,
            patch_size=12,
        )
        size: dict[str, Any] = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 112}
        yield (
            "llama-gqa-clip",
            _tiny(LlamaConfig(**size, num_hidden_layers=4, **heads(4, 2, 32)), clip),
        )
        yield (
            "llama-mha-bias-rope3-siglip",
            _tiny(
                LlamaConfig(
                    **size,
                    num_hidden_layers=2,
                    **heads(2, 2, 64),
                    attention_bias=True,
                    mlp_bias=True,
                    rope_parameters={
                        "rope_type": "llama3",
                        "rope_theta": 10000.0,
                        "factor": 8.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 64,
                    },
                ),
                siglip,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            ),
        )
        yield (
            "mistral-clip-layers",
            _tiny(
                MistralConfig(**size, num_hidden_layers=3, **heads(6, 2, 40), sliding_window=None),
                clip,
                vision_feature_layer=[-2, 1],
                vision_feature_select_strategy="full",
            ),
        )
        yield (
            "qwen2-tied-siglip",
            _tiny(
                Qwen2Config(**size, num_hidden_layers=3, **heads(4, 1, 16)),
                siglip,
                vision_feature_layer=-1,
                tie_word_embeddings=True,
            ),
        )

    def tiny_files(self, config: LlavaConfig) -> dict[str, str]:
        side = config.vision_config.image_size
        size = {"height": side, "width": side}
        processor: dict[str, Any] = {"image_processor_type": "SiglipImageProcessor", "size": size}
        if config.vision_config.model_type == "clip_vision_model":
            processor = {"image_processor_type": "CLIPImageProcessor", "crop_size": size}
            processor["size"] = {"shortest_edge": side}
        return {"preprocessor_config.json": json.dumps(processor)}


def _tiny(text: Any, vision: Any, **options: Any) -> Any:
    options = {"vision_feature_layer": -2, "image_token_index": 3} | options
    return tiny(LlavaConfig, text, vision, **options)


FAMILY = Llava()
