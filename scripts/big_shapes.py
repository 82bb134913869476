"""Configurations of released models: of 7 to 8 billion weights, one for every kind of text model
that the families have where there is one, and smaller ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf

from lvlm.export.families.parts.llama_text import tiny_token

# Shared by the 7B and 8B models of a generation
QWEN2 = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
QWEN3 = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
}
CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _joined(kind: Any, text: Any, vision: Any, **options: Any) -> Any:
    return kind(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        tie_word_embeddings=text.tie_word_embeddings,
        **options,
    )


def llava() -> Any:
    text = hf.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        vocab_size=32064,
        rms_norm_eps=1e-5,
    )
    vision = hf.CLIPVisionConfig(**CLIP_LARGE)
    return _joined(hf.LlavaConfig, text, vision, image_token_index=3, vision_feature_layer=-2)


def llava_next() -> Any:
    text = hf.MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        vocab_size=32064,
        rms_norm_eps=1e-5,
        sliding_window=None,
    )
    grid = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    vision = hf.CLIPVisionConfig(**CLIP_LARGE)
    options = {"image_token_index": 3, "image_grid_pinpoints": grid}
    return _joined(hf.LlavaNextConfig, text, vision, **options)


# What the smaller models of a generation have otherwise
QWEN2_HALF = QWEN2 | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN2_TWO = QWEN2_HALF | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
}
QWEN2_THREE = QWEN2_HALF | {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
}


def llava_onevision(text: dict[str, Any] = QWEN2) -> Any:
    vision = hf.SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    sides = range(384, 2305, 384)
    return _joined(
        hf.LlavaOnevisionConfig,
        hf.Qwen2Config(**text),
        vision,
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=[[height, width] for height in sides for width in sides],
    )


def internvl() -> Any:
    vision = hf.InternVLVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=448,
        patch_size=14,
        attention_bias=True,
    )
    return _joined(hf.InternVLConfig, hf.Qwen3Config(**QWEN3), vision, image_token_id=3)


def qwen2_vl(text: dict[str, Any] = QWEN2) -> Any:
    width = text["hidden_size"]
    vision = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "hidden_size": width}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return hf.Qwen2VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=3,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )


def qwen2_5_vl(text: dict[str, Any] = QWEN2) -> Any:
    vision = {
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "depth": 32,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return hf.Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=3,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )


def qwen3_vl() -> Any:
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "depth": 27,
        "num_heads": 16,
        "out_hidden_size": 4096,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    return hf.Qwen3VLConfig(
        text_config=QWEN3 | {"rope_parameters": rope}, vision_config=vision, image_token_id=3
    )


def gemma3() -> Any:
    text = hf.Gemma3TextConfig(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        sliding_window=1024,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    vision = hf.SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=896,
        patch_size=14,
        vision_use_head=False,
    )
    tokens = {"boi_token_index": 3, "eoi_token_index": tiny_token(0)}
    return _joined(hf.Gemma3Config, text, vision, **tokens, image_token_index=tiny_token(1))


# Name: (configuration, dtype of the released weights)
SHAPES: dict[str, tuple[Callable[[], Any], torch.dtype]] = {
    "llava-onevision-qwen2-0.5b": (partial(llava_onevision, QWEN2_HALF), torch.float16),
    "qwen2-vl-2b": (partial(qwen2_vl, QWEN2_TWO), torch.bfloat16),
    "qwen2.5-vl-3b": (partial(qwen2_5_vl, QWEN2_THREE), torch.bfloat16),
    "gemma-3-4b": (gemma3, torch.bfloat16),
    "llava-1.5-7b": (llava, torch.float16),
    "llava-v1.6-mistral-7b": (llava_next, torch.float16),
    "llava-onevision-qwen2-7b": (llava_onevision, torch.float16),
    "internvl3.5-8b": (internvl, torch.bfloat16),
    "qwen2-vl-7b": (qwen2_vl, torch.bfloat16),
    "qwen2.5-vl-7b": (qwen2_5_vl, torch.bfloat16),
    "qwen3-vl-8b": (qwen3_vl, torch.bfloat16),
}
