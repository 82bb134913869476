"""Small LLaVA configurations drawn at random, one a number: what no list of them thinks of."""

from __future__ import annotations

import random
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from lvlm.export.families.parts.llama_text import tiny

PREFIX = "drawn:"
LAYOUTS = ("mha", "gqa", "mqa")


def draw_config(number: int) -> Any:
    """A configuration of class LlavaForConditionalGeneration; the heads' layout goes in turn."""
    chance = random.Random(number)
    tower = _tower(chance)
    options: dict[str, Any] = {
        "image_token_index": 3,
        "vision_feature_layer": chance.choice([-1, -2]),
        "vision_feature_select_strategy": "full" if tower.model_type != CLIP else "default",
        "multimodal_projector_bias": chance.random() < 0.5,
        "projector_hidden_act": chance.choice(["gelu", "relu"]),
        "tie_word_embeddings": chance.random() < 0.3,
    }
    return tiny(LlavaConfig, _text(chance, LAYOUTS[number % 3]), tower, **options)


CLIP = CLIPVisionConfig.model_type


def _tower(chance: random.Random) -> Any:
    heads, patch = chance.choice([2, 3]), chance.choice([10, 14])
    size: dict[str, Any] = {
        "hidden_size": heads * chance.choice([13, 17, 24]),
        "intermediate_size": chance.randrange(61, 100),
        "num_hidden_layers": chance.choice([2, 3]),
        "num_attention_heads": heads,
        "image_size": patch * chance.randrange(4, 8),
        "patch_size": patch,
    }
    return chance.choice([CLIPVisionConfig, SiglipVisionConfig])(**size)


def _text(chance: random.Random, layout: str) -> Any:
    kv_heads = 1 if layout == "mqa" else chance.choice([2, 3])
    group = 1 if layout == "mha" else chance.choice([2, 3])
    heads = kv_heads * group
    size: dict[str, Any] = {
        "vocab_size": 541 + chance.randrange(50),  # the shipped tokenizer has 541
        "hidden_size": heads * chance.randrange(48 // heads, 100 // heads),
        "intermediate_size": chance.randrange(61, 140),
        "num_hidden_layers": chance.choice([2, 3, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * chance.randrange(16, 65),
        "rms_norm_eps": chance.choice([1e-5, 1e-6]),
        "hidden_act": chance.choice(["silu", "gelu"]),
        "rope_parameters": chance.choice(
            [
                {"rope_type": "default", "rope_theta": chance.choice([1e3, 1e4, 5e5])},
                {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            ]
        ),
    }
    kind = chance.choice([LlamaConfig, LlamaConfig, MistralConfig, Qwen2Config])
    if kind is LlamaConfig:
        size |= {"attention_bias": chance.random() < 0.5, "mlp_bias": chance.random() < 0.5}
    if kind is MistralConfig:
        size["sliding_window"] = None
    return kind(**size)
