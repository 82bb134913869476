"""LFM2-VL: SigLIP 2 tower for images of any size, several patches a token, a text model most of
whose layers convolve."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Siglip2VisionConfig,
)

from lvlm.core.errors import CheckpointError
from lvlm.export.families.family import PromptFiles
from lvlm.export.families.parts.leaf_tables import leaves
from lvlm.export.families.parts.lfm2_text import TEXTS, lfm2_text
from lvlm.export.families.parts.lfm2_vision import TOWERS, Lfm2Vision
from lvlm.export.families.parts.llama_text import (
    added_token,
    build_model,
    one_of,
    preprocessor,
    read_common,
    tiny,
    tiny_tokenizer,
    token_text,
)
from lvlm.export.families.parts.side_files import prompt_files, read_json
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.ports import GraphPort
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.processors.lfm2_vl import (
    max_parts,
    max_tokens,
    normalise_config,
    part_tokens,
    with_max_tokens,
)
from lvlm.runtime.prompt.prompts import Prompt

BEGIN, END, WHOLE = "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"


class Lfm2Vl:
    """See Family. Parts of an image are padded to one number of tokens, under a mask."""

    name = "lfm2-vl"
    aliases: ClassVar[Mapping[str, str]] = {
        "lfm2-vl": "LiquidAI/LFM2-VL-1.6B",
        "lfm2-vl-450m": "LiquidAI/LFM2-VL-450M",
        "lfm2-vl-3b": "LiquidAI/LFM2-VL-3B",
    }
    model_types = ("lfm2_vl",)
    image_handling = "its own size; large ones as tiles, and the whole as one more"
    video = ""
    leaves = leaves(TEXTS, TOWERS)

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        config = read_common(
            self.name, Lfm2VlConfig, raw, TEXTS, "lfm2", TOWERS, "siglip2_vision_model"
        )
        text, vision = config.text_config, config.vision_config
        for kind in text.layer_types:
            one_of(self.name, "layer type", kind, ("full_attention", "conv"))
        if "full_attention" not in text.layer_types:
            raise CheckpointError("text_config has no layer that attends; this is no LFM2")
        if "conv" in text.layer_types and not 2 <= text.conv_L_cache <= 64:
            raise CheckpointError(f"conv_L_cache {text.conv_L_cache} is not supported; 2 to 64 are")
        if not isinstance(vision.patch_size, int):
            raise CheckpointError(f"vision patch_size {vision.patch_size} is not supported")
        one_of(self.name, "num_channels", vision.num_channels, (3,))
        if math.isqrt(vision.num_patches) ** 2 != vision.num_patches:
            raise CheckpointError(
                f"{vision.num_patches} learned positions (num_patches) are not supported; squares "
                "are"
            )
        return config

    def build(self, config: Any) -> nn.Module:
        return build_model(Lfm2VlForConditionalGeneration, config)

    def language(self, model: Any, config: Lfm2VlConfig) -> LanguageModel:
        return lfm2_text(model.model.language_model, model.lm_head, config.text_config)

    def vision(self, model: Any, config: Lfm2VlConfig) -> nn.Module:
        del config
        return Lfm2Vision(model)

    def vision_inputs(self, images: Images) -> list[GraphPort]:
        tokens, each = part_tokens(images.processor), images.processor["merge"] ** 2
        values = 3 * images.processor["patch"] ** 2
        return [
            GraphPort("pixel_values", torch.float32, ("units", tokens, each, values)),
            GraphPort("position_ids", torch.int64, ("units", tokens, each, 2)),
            GraphPort("sides", torch.int64, ("units", 2)),
        ]

    def transformers_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        if not prompt.images:
            return {}
        names = ("pixel_values", "position_ids", "sides")
        arrays = [
            torch.cat([torch.from_numpy(image.arrays[name]) for image in prompt.images])
            for name in names
        ]
        pixels, places, sides = arrays[0].flatten(1, 2), arrays[1].flatten(1, 2), arrays[2]
        ordered, mask = torch.zeros_like(pixels), torch.zeros(pixels.shape[:2], dtype=torch.int32)
        for part, own in enumerate(places):
            there = own[:, 0] >= 0
            at = own[there, 0] * sides[part, 1] + own[there, 1]
            ordered[part, at] = pixels[part, there]
            mask[part, at] = 1
        return {"pixel_values": ordered, "pixel_attention_mask": mask, "spatial_shapes": sides}

    def images(self, config: Lfm2VlConfig, folder: Path) -> Images:
        token = token_text(folder, config.image_token_id)
        named = read_json(folder / "processor_config.json").get("use_image_special_tokens", True)
        marks = (
            added_token(folder, "image_start_token", BEGIN),
            added_token(folder, "image_end_token", END),
            added_token(folder, "image_thumbnail_token", WHOLE),
        )
        processor = normalise_config(preprocessor(folder), token, marks if named else None)
        cut = processor["patch"], processor["merge"]
        wanted = config.vision_config.patch_size, config.downsample_factor
        if cut != wanted:
            raise CheckpointError(
                f"the image processor has patches and a downsample_factor of {cut}, config.json "
                f"asks for {wanted}; the folder mixes files of two models"
            )
        return Images(
            token=token,
            token_id=config.image_token_id,
            tokens=max_tokens(processor),
            grid=(),
            size=(),
            processor=processor,
            as_text=True,
            max_dims={"units": max_parts(processor)},
        )

    def bounded(self, images: Images, tokens: int) -> Images:
        processor = with_max_tokens(images.processor, tokens)
        units = {"units": max_parts(processor)}
        return replace(images, tokens=max_tokens(processor), processor=processor, max_dims=units)

    def prompt(self, config: Lfm2VlConfig, folder: Path) -> PromptFiles:
        return prompt_files(folder, config.text_config)

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """GQA and MHA, convolutions first, last and side by side, of three sizes, with biases;
        tiles and images as they are, learned positions stretched and shrunk."""
        size: dict[str, Any] = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 112}
        vision: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80}
        attend, convolve = "full_attention", "conv"
        yield (
            "gqa-conv-first",
            tiny(
                Lfm2VlConfig,
                Lfm2Config(
                    **size,
                    num_hidden_layers=5,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    layer_types=[convolve, convolve, attend, convolve, attend],
                ),
                Siglip2VisionConfig(
                    **vision,
                    num_hidden_layers=2,
                    num_attention_heads=3,
                    patch_size=8,
                    num_patches=16,
                    vision_use_head=False,
                ),
                image_token_id=3,
                projector_hidden_size=56,
                tie_word_embeddings=True,
            ),
        )
        yield (
            "mha-bias-conv-last",
            tiny(
                Lfm2VlConfig,
                Lfm2Config(
                    **size,
                    num_hidden_layers=4,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    layer_types=[attend, convolve, attend, convolve],
                    conv_L_cache=4,
                    conv_bias=True,
                    block_auto_adjust_ff_dim=False,
                ),
                Siglip2VisionConfig(
                    **vision,
                    num_hidden_layers=3,
                    num_attention_heads=4,
                    patch_size=5,
                    num_patches=144,
                    vision_use_head=False,
                ),
                image_token_id=3,
                downsample_factor=3,
                projector_hidden_size=72,
                projector_use_layernorm=False,
                projector_bias=False,
            ),
        )
        yield (
            "attention-only-last",
            tiny(
                Lfm2VlConfig,
                Lfm2Config(
                    **size,
                    num_hidden_layers=4,
                    num_attention_heads=4,
                    num_key_value_heads=1,
                    layer_types=[convolve, convolve, convolve, attend],
                    conv_L_cache=2,
                ),
                Siglip2VisionConfig(
                    **vision,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    patch_size=8,
                    num_patches=25,
                ),
                image_token_id=3,
                projector_hidden_size=64,
            ),
        )

    def tiny_files(self, config: Lfm2VlConfig) -> dict[str, str]:
        """Tiles of 9 tokens; where three patches make a token's side, images as they are."""
        side = config.vision_config.patch_size * config.downsample_factor
        processor = {
            "image_processor_type": "Lfm2VlImageProcessorFast",
            "encoder_patch_size": config.vision_config.patch_size,
            "downsample_factor": config.downsample_factor,
            "do_image_splitting": config.downsample_factor == 2,
            "tile_size": 3 * side,
            "max_tiles": 4,
            "min_image_tokens": 4,
            "max_image_tokens": 12,
        }
        places = [
            f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)
        ]
        return {
            "preprocessor_config.json": json.dumps(processor),
            "tokenizer.json": tiny_tokenizer(BEGIN, END, WHOLE, *places),
        }


FAMILY = Lfm2Vl()
