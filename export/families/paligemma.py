"""PaliGemma 1 and 2: SigLIP tower, a linear projector, Gemma or Gemma 2 text; all tokens of a
prompt see one another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from lvlm.core.errors import CheckpointError
from lvlm.export.families.family import fixed_tokens
from lvlm.export.families.parts.gemma_text import TEXTS
from lvlm.export.families.parts.leaf_tables import Kinds, leaves
from lvlm.export.families.parts.llama_text import (
    heads,
    language_model,
    one_of,
    preprocessor,
    read_common,
    tiny,
    token_text,
)
from lvlm.export.families.parts.llava_like import TOWERS, LlavaVision
from lvlm.export.families.parts.pixel_values import PixelValues
from lvlm.export.families.parts.side_files import load_tokenizer
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.processors import llava
from lvlm.runtime.processors.paligemma import PaliGemmaProcessor
from lvlm.runtime.prompt.prompts import Prompt

OWN_TOWERS: Kinds = {"siglip_vision_model": TOWERS["siglip_vision_model"]}


class PaliGemma(PixelValues):
    """See Family. One square of pixels, so every image has the same number of tokens."""

    name = "paligemma"
    aliases: ClassVar[Mapping[str, str]] = {
        "paligemma": "google/paligemma-3b-mix-224",
        "paligemma2": "google/paligemma2-3b-mix-224",
        "paligemma2-10b": "google/paligemma2-10b-mix-224",
    }
    model_types = ("paligemma",)
    image_handling = "one size, the same tokens for all; all tokens of a prompt see one another"
    video = ""
    leaves = leaves(TEXTS, OWN_TOWERS)
    model_class = PaliGemmaForConditionalGeneration

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        config = read_common(
            self.name, PaliGemmaConfig, raw, TEXTS, "gemma", OWN_TOWERS, "siglip_vision_model"
        )
        text = config.text_config
        one_of(self.name, "use_bidirectional_attention", text.use_bidirectional_attention, (True,))
        for name, found, wanted in (
            ("projection_dim", config.projection_dim, text.hidden_size),
            ("image_token_index", config.image_token_id, range(text.vocab_size)),
        ):
            if found not in (wanted if isinstance(wanted, range) else (wanted,)):
                raise CheckpointError(
                    f"{name} {found} does not fit the text model, of width {text.hidden_size} and "
                    f"{text.vocab_size} tokens; is config.json of this checkpoint?"
                )
        return config

    def language(self, model: Any, config: PaliGemmaConfig) -> LanguageModel:
        text = config.text_config
        found = language_model(self, model.model.language_model, model.lm_head, text)
        return replace(
            found.with_rotary(CountedFromOne(found.rotaries[0])),
            bidirectional="prompt",
            softcap=getattr(text, "attn_logit_softcapping", None) or 0.0,
            head_softcap=getattr(text, "final_logit_softcapping", None) or 0.0,
        )

    def vision(self, model: Any, config: PaliGemmaConfig) -> nn.Module:
        return PaliGemmaVision(model, [config.vision_config.num_hidden_layers])

    def transformers_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        # 0 are those that see one another: all of a prompt
        ids = torch.zeros(1, len(prompt.ids), dtype=torch.int64)
        return {**super().transformers_inputs(prompt), "token_type_ids": ids}

    def images(self, config: PaliGemmaConfig, folder: Path) -> Images:
        vision, given = config.vision_config, preprocessor(folder)
        side = vision.image_size // vision.patch_size
        written = given.get("image_seq_length", side * side)
        if written != side * side:
            raise CheckpointError(
                f"image_seq_length {written} of the image processor and {side} x {side} patches of "
                "config.json differ; the folder mixes files of two models"
            )
        pixels = llava.normalise_config(given, side * side)
        size = {"height": vision.image_size, "width": vision.image_size}
        if pixels["resize"] != size or pixels["crop"] is not None:
            raise CheckpointError(
                f"the image processor gives {pixels['crop'] or pixels['resize']}, the vision tower "
                f"takes {size}; make them equal"
            )
        token = token_text(folder, config.image_token_id)
        begin = load_tokenizer(folder).bos_token
        if not begin:
            raise CheckpointError(
                "the tokenizer names no bos_token, which stands behind a prompt's images; name it "
                "in tokenizer_config.json"
            )
        return Images(
            token=token,
            token_id=config.image_token_id,
            tokens=side * side,
            grid=(side, side),
            size=(vision.image_size, vision.image_size),
            processor={
                "name": PaliGemmaProcessor.name,
                "pixels": pixels,
                "image_token": token,
                "begin": str(begin),
            },
        )

    def bounded(self, images: Images, tokens: int) -> Images:
        raise fixed_tokens(images, tokens)

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """Both text models; GQA and MHA, windows longer than any prompt and shorter, caps of both
        kinds and none, biases, tied weights and not."""
        size: dict[str, Any] = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 112}
        yield (
            "gemma2-gqa",
            _tiny(
                Gemma2Config(
                    **size,
                    num_hidden_layers=4,
                    **heads(4, 2, 32),
                    query_pre_attn_scalar=24,
                    attn_logit_softcapping=2.0,
                    final_logit_softcapping=10.0,
                ),
                _tower(4, 3, 56, 14),
                tie_word_embeddings=True,
            ),
        )
        yield (
            "gemma2-mha-bias-window",
            _tiny(
                Gemma2Config(
                    **size,
                    num_hidden_layers=3,
                    **heads(2, 2, 48),
                    query_pre_attn_scalar=48,
                    sliding_window=11,
                    attention_bias=True,
                    attn_logit_softcapping=1.5,
                ),
                _tower(3, 4, 60, 12),
            ),
        )
        yield (
            "gemma-mqa",
            _tiny(
                GemmaConfig(**size, num_hidden_layers=4, **heads(4, 1, 16)),
                _tower(1, 2, 48, 8),
                tie_word_embeddings=True,
            ),
        )

    def tiny_files(self, config: PaliGemmaConfig) -> dict[str, str]:
        side = config.vision_config.image_size
        processor = {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": side, "width": side},
            "image_seq_length": (side // config.vision_config.patch_size) ** 2,
        }
        tokenizer = {
            "tokenizer_class": "TokenizersBackend",
            "processor_class": "PaliGemmaProcessor",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "extra_special_tokens": {"image_token": "<image>"},
        }
        return {
            "preprocessor_config.json": json.dumps(processor),
            "tokenizer_config.json": json.dumps(tokenizer),
        }


def _tiny(text: Any, vision: Any, **options: Any) -> Any:
    own = {"projection_dim": text.hidden_size, "image_token_index": 3}
    return tiny(PaliGemmaConfig, text, vision, **own, **options)


def _tower(layers: int, attention_heads: int, side: int, patch: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=attention_heads,
        image_size=side,
        patch_size=patch,
        vision_use_head=False,
    )


class CountedFromOne(nn.Module):
    """A rotary embedding for positions that begin with 1."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.rotary(x, position_ids=position_ids + 1)


class PaliGemmaVision(LlavaVision):
    """Tower with its last norm, then the projector: [units,3,S,S] -> rows [units * tokens,D]."""

    def _rows(self, states: Any) -> torch.Tensor:
        rows = self.projector(self.tower.post_layernorm(states[-1])).flatten(0, 1)
        assert isinstance(rows, torch.Tensor)
        return rows


FAMILY = PaliGemma()
