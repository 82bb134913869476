"""Gemma 3: SigLIP tower, patches pooled, text layers with a window around those without; the tokens
of an image see one another."""

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
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from lvlm.core.errors import CheckpointError
from lvlm.export.families.family import fixed_tokens
from lvlm.export.families.parts.gemma3_text import TEXTS, gemma3_text
from lvlm.export.families.parts.leaf_tables import Kinds, leaves
from lvlm.export.families.parts.llama_text import (
    added_token,
    heads,
    one_of,
    preprocessor,
    read_common,
    tiny,
    tiny_token,
    tiny_tokenizer,
    token_text,
)
from lvlm.export.families.parts.llava_like import TOWERS
from lvlm.export.families.parts.pixel_values import PixelValues
from lvlm.export.families.parts.side_files import read_json
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.repeats import run_layer
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.processors.gemma3 import normalise_config
from lvlm.runtime.prompt.prompts import Prompt

OWN_TOWERS: Kinds = {"siglip_vision_model": TOWERS["siglip_vision_model"]}


class Gemma3(PixelValues):
    """See Family. One square of pixels, so every image has the same number of tokens."""

    name = "gemma3"
    aliases: ClassVar[Mapping[str, str]] = {
        "gemma3": "google/gemma-3-4b-it",
        "gemma3-12b": "google/gemma-3-12b-it",
        "gemma3-27b": "google/gemma-3-27b-it",
    }
    model_types = ("gemma3",)
    image_handling = "one size, the same tokens for all, which see one another"
    video = ""
    leaves = leaves(TEXTS, OWN_TOWERS)
    model_class = Gemma3ForConditionalGeneration

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        config = read_common(
            self.name,
            Gemma3Config,
            raw,
            TEXTS,
            "gemma3_text",
            OWN_TOWERS,
            "siglip_vision_model",
        )
        text, vision = config.text_config, config.vision_config
        one_of(
            self.name,
            "use_bidirectional_attention",
            text.use_bidirectional_attention,
            (False, None),
        )
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            one_of(self.name, name, getattr(text, name), (None,))
        side, tokens = vision.image_size // vision.patch_size, config.mm_tokens_per_image or 0
        along = math.isqrt(max(0, tokens))
        if not along or along * along != tokens or not side or side % along:
            raise CheckpointError(
                f"mm_tokens_per_image {tokens} of {side} x {side} patches is not supported; "
                "squares of patches that fit are"
            )
        return config

    def language(self, model: Any, config: Gemma3Config) -> LanguageModel:
        parts, text = model.model.language_model, config.text_config
        return replace(gemma3_text(self, parts, model.lm_head, text), bidirectional="image")

    def vision(self, model: Any, config: Gemma3Config) -> nn.Module:
        del config
        return Gemma3Vision(model)

    def transformers_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        images = torch.from_numpy(prompt.image_id > 0).long()[None]
        return {**super().transformers_inputs(prompt), "token_type_ids": images}

    def images(self, config: Gemma3Config, folder: Path) -> Images:
        side, tokens = config.vision_config.image_size, config.mm_tokens_per_image
        written = read_json(folder / "processor_config.json").get("image_seq_length", tokens)
        if written != tokens:
            raise CheckpointError(
                f"image_seq_length {written} of processor_config.json and mm_tokens_per_image "
                f"{tokens} of config.json differ; the folder mixes files of two models"
            )
        begin, end = (
            added_token(folder, name, token_text(folder, token_id))
            for name, token_id in (
                ("boi_token", config.boi_token_index),
                ("eoi_token", config.eoi_token_index),
            )
        )
        token = token_text(folder, config.image_token_id)
        processor = normalise_config(preprocessor(folder), tokens, token, begin, end)
        if processor["size"] != {"height": side, "width": side}:
            raise CheckpointError(
                f"the image processor gives {processor['size']}, the vision tower takes {side} x "
                f"{side}; make them equal"
            )
        return Images(
            token=begin,
            token_id=config.image_token_id,
            tokens=tokens,
            grid=(),
            size=(side, side),
            processor=processor,
            # Several at once would each hold all logits of their patches, 16 for every token
            independent_units=False,
            as_text=True,
            bidirectional=True,
            patches=(side // config.vision_config.patch_size) ** 2,
            patch_heads=config.vision_config.num_attention_heads,
        )

    def bounded(self, images: Images, tokens: int) -> Images:
        raise fixed_tokens(images, tokens)

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """GQA and MHA, layers of both types first, windows shorter and longer than an image and
        than any prompt, pooled patches and single ones, biases, tied weights and not."""
        size: dict[str, Any] = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 112}
        vision: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80}
        tokens = {
            "boi_token_index": 3,
            "eoi_token_index": tiny_token(0),
            "image_token_index": tiny_token(1),
        }
        local, linear = "sliding_attention", {"rope_type": "linear", "factor": 2.0}
        yield (
            "gqa-window",
            tiny(
                Gemma3Config,
                Gemma3TextConfig(
                    **size,
                    num_hidden_layers=3,
                    **heads(4, 2, 32),
                    query_pre_attn_scalar=24,
                    sliding_window=11,
                    layer_types=[local, "full_attention", local],
                    rope_parameters={
                        local: {"rope_type": "default", "rope_theta": 100.0},
                        "full_attention": {**linear, "rope_theta": 1e4},
                    },
                ),
                SiglipVisionConfig(
                    **vision,
                    num_hidden_layers=2,
                    num_attention_heads=3,
                    image_size=64,
                    patch_size=8,
                    vision_use_head=False,
                ),
                **tokens,
                mm_tokens_per_image=16,
                tie_word_embeddings=True,
            ),
        )
        yield (
            "mha-bias-global-first",
            tiny(
                Gemma3Config,
                Gemma3TextConfig(
                    **size,
                    num_hidden_layers=3,
                    **heads(2, 2, 48),
                    query_pre_attn_scalar=48,
                    sliding_window=60,
                    layer_types=["full_attention", local, local],
                    attention_bias=True,
                ),
                SiglipVisionConfig(
                    **vision,
                    num_hidden_layers=3,
                    num_attention_heads=4,
                    image_size=35,
                    patch_size=5,
                    vision_use_head=False,
                ),
                **tokens,
                mm_tokens_per_image=49,
            ),
        )

        yield (
            "wide-window",
            tiny(
                Gemma3Config,
                Gemma3TextConfig(
                    **size,
                    num_hidden_layers=4,
                    **heads(4, 1, 32),
                    layer_types=[local, local, "full_attention", local],
                ),
                SiglipVisionConfig(
                    **vision,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    image_size=48,
                    patch_size=6,
                    vision_use_head=False,
                ),
                **tokens,
                mm_tokens_per_image=64,
            ),
        )

    def tiny_files(self, config: Gemma3Config) -> dict[str, str]:
        side = config.vision_config.image_size
        processor = {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": side, "width": side},
        }
        tokenizer = {
            "tokenizer_class": "TokenizersBackend",
            "processor_class": "Gemma3Processor",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "extra_special_tokens": {
                "boi_token": "<image>",
                "eoi_token": END,
                "image_token": SOFT,
            },
        }
        whole = {
            "processor_class": "Gemma3Processor",
            "image_seq_length": config.mm_tokens_per_image,
        }
        return {
            "preprocessor_config.json": json.dumps(processor),
            "processor_config.json": json.dumps(whole),
            "tokenizer_config.json": json.dumps(tokenizer),
            "tokenizer.json": tiny_tokenizer(END, SOFT),
        }


END, SOFT = "<end_of_image>", "<image_soft_token>"  # of tiny configurations


class Gemma3Vision(nn.Module):
    """Tower, then the projector, which pools patches: [units,3,S,S] -> rows [units * tokens,D]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.tower.embeddings(pixel_values)
        for layer in self.tower.encoder.layers:
            hidden = run_layer(layer, hidden, masked=True)
        rows = self.projector(self.tower.post_layernorm(hidden)).flatten(0, 1)
        assert isinstance(rows, torch.Tensor)
        return rows


FAMILY = Gemma3()
