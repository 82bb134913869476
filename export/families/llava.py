"""LLaVA 1.5 and its kin: CLIP or SigLIP tower, projector, Llama, Mistral or Qwen2 text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
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

from lvlm.export.families._base import PromptFiles
from lvlm.export.families._files import prompt_files, read_json
from lvlm.export.language import LanguageModel
from lvlm.export.recipes._sequence import GraphInput
from lvlm.export.standard_ops import ATTENTION
from lvlm.runtime.bundle import Images
from lvlm.runtime.errors import CheckpointError
from lvlm.runtime.pictures import Picture
from lvlm.runtime.processors.llava import normalise_config

TEXT_TYPES = ("llama", "mistral", "qwen2")
VISION_TYPES = ("clip_vision_model", "siglip_vision_model")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # tables that do not depend on the length

# Names changed between versions of transformers; applied in order, the first that matches.
RENAMES = (
    (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"^(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
)
# Tables that older versions stored although they follow from the configuration.
LEFTOVERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


class Llava:
    """See Family. One pooled feature per patch, so every picture has the same number of tokens."""

    name = "llava"
    aliases: ClassVar[Mapping[str, str]] = {
        "llava": "llava-hf/llava-1.5-7b-hf",
        "llava-13b": "llava-hf/llava-1.5-13b-hf",
    }
    model_types = ("llava",)

    def read_config(self, raw: Mapping[str, Any]) -> LlavaConfig:
        text, vision = raw.get("text_config") or {}, raw.get("vision_config") or {}
        _one_of("text backbone", text.get("model_type", "llama"), TEXT_TYPES)
        _one_of("vision tower", vision.get("model_type", "clip_vision_model"), VISION_TYPES)
        if raw.get("quantization_config"):
            raise CheckpointError(
                "the checkpoint is quantized (quantization_config); export the original weights"
            )
        # Older configurations call the table of rotary parameters rope_scaling, its kind type.
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        _one_of("rope_type", rope.get("rope_type") or rope.get("type") or "default", ROPE_TYPES)
        try:
            config = LlavaConfig.from_dict(dict(raw))
        except Exception as error:  # transformers' own checks raise types of several packages
            reason = " ".join(str(error).split())
            raise CheckpointError(f"config.json is not valid: {reason}") from None
        if "sliding_attention" in (getattr(config.text_config, "layer_types", None) or ()):
            raise CheckpointError(
                "some layers use sliding-window attention (layer_types); not supported"
            )
        return config

    def build(self, config: LlavaConfig) -> nn.Module:
        model = LlavaForConditionalGeneration._from_config(
            config, attn_implementation=ATTENTION, dtype=torch.get_default_dtype()
        )
        assert isinstance(model, nn.Module)
        return model

    def rename(self, key: str) -> str | None:
        if LEFTOVERS.search(key):
            return None
        for pattern, target in RENAMES:
            renamed, hits = re.subn(pattern, target, key)
            if hits:
                return renamed
        return key

    def language(self, model: Any, config: LlavaConfig) -> LanguageModel:
        text, parts = config.text_config, model.model.language_model
        windowed = text.model_type == "mistral"
        return LanguageModel(
            embed=parts.embed_tokens,
            rotary=parts.rotary_emb,
            blocks=list(parts.layers),
            norm=parts.norm,
            head=model.lm_head,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None)
            or text.hidden_size // text.num_attention_heads,
            hidden=text.hidden_size,
            vocab=text.vocab_size,
            scale=float(parts.layers[0].self_attn.scaling),
            window=getattr(text, "sliding_window", None) if windowed else None,
        )

    def vision(self, model: Any, config: LlavaConfig) -> nn.Module:
        return LlavaVision(model, config)

    def vision_inputs(self, images: Images) -> list[GraphInput]:
        return [GraphInput("pixel_values", torch.float32, ("units", 3, *images.size))]

    def transformers_inputs(self, pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
        pixels = [torch.from_numpy(p.arrays["pixel_values"]) for p in pictures]
        return {"pixel_values": torch.cat(pixels)} if pixels else {}

    def images(self, config: LlavaConfig, folder: Path) -> Images:
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        # "default" drops the first token; only CLIP has a class token there.
        extra = int(vision.model_type == "clip_vision_model")
        tokens = side * side + extra - int(config.vision_feature_select_strategy == "default")
        processor = read_json(folder / "processor_config.json").get("image_processor")
        processor = processor or read_json(folder / "preprocessor_config.json", required=True)
        return Images(
            token=_image_token(folder, config.image_token_id),
            token_id=config.image_token_id,
            tokens=tokens,
            grid=(side, side),
            size=(vision.image_size, vision.image_size),
            processor=normalise_config(processor, tokens),
        )

    def prompt(self, config: LlavaConfig, folder: Path) -> PromptFiles:
        return prompt_files(folder, config.text_config)

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
        size: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 112}
        yield (
            "llama-gqa-clip",
            _tiny(LlamaConfig(**size, num_hidden_layers=4, **_heads(4, 2, 32)), clip),
        )
        yield (
            "llama-mha-bias-rope3-siglip",
            _tiny(
                LlamaConfig(
                    **size,
                    num_hidden_layers=2,
                    **_heads(2, 2, 64),
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
                MistralConfig(**size, num_hidden_layers=3, **_heads(6, 2, 40), sliding_window=None),
                clip,
                vision_feature_layer=[-2, 1],
                vision_feature_select_strategy="full",
            ),
        )
        yield (
            "qwen2-tied-siglip",
            _tiny(
                Qwen2Config(**size, num_hidden_layers=3, **_heads(4, 1, 16)),
                siglip,
                vision_feature_layer=-1,
                tie_word_embeddings=True,
            ),
        )


class LlavaVision(nn.Module):
    """Tower up to the feature layer(s), then the projector."""

    def __init__(self, model: Any, config: LlavaConfig) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        layers = config.vision_feature_layer
        depth = config.vision_config.num_hidden_layers + 1
        wanted: Sequence[int] = [layers] if isinstance(layers, int) else layers
        self.wanted = [i % depth for i in wanted]
        self.first = int(config.vision_feature_select_strategy == "default")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.tower.embeddings(pixel_values)
        if hasattr(self.tower, "pre_layrnorm"):
            hidden = self.tower.pre_layrnorm(hidden)
        states = [hidden]
        for layer in self.tower.encoder.layers[: max(self.wanted)]:
            states.append(layer(states[-1], None))
        features = torch.cat([states[i][:, self.first :] for i in self.wanted], dim=-1)
        rows = self.projector(features).flatten(0, 1)
        assert isinstance(rows, torch.Tensor)
        return rows


def _one_of(what: str, value: Any, supported: Sequence[str]) -> None:
    if value not in supported:
        raise CheckpointError(f"{what} '{value}' is not supported; family llava has {supported}")


def _image_token(folder: Path, token_id: int) -> str:
    tokens = read_json(folder / "tokenizer.json", required=True).get("added_tokens", [])
    for token in tokens:
        if token.get("id") == token_id:
            return str(token["content"])
    raise CheckpointError(
        f"tokenizer.json has no token {token_id}, the image token of config.json; "
        "the folder mixes files of two models"
    )


def _heads(heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def _tiny(text: Any, vision: Any, **options: Any) -> LlavaConfig:
    text.bos_token_id, text.eos_token_id, text.pad_token_id = 1, 2, 0
    options = {"tie_word_embeddings": False, "vision_feature_layer": -2} | options
    text.tie_word_embeddings = options["tie_word_embeddings"]
    return LlavaConfig(
        text_config=json.loads(text.to_json_string(use_diff=False)),
        vision_config=json.loads(vision.to_json_string(use_diff=False)),
        image_token_index=3,
        **options,
    )


FAMILY = Llava()
