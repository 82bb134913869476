"""Random-weight LLaVA checkpoints of a small shape, 576 image tokens, to measure speed with.

    python scripts/make_checkpoint.py --shape 135m -o /tmp/bench/checkpoint

135m   Llama 576 wide, 30 layers, 9 query and 3 KV heads of 64, vocabulary 49,152: weights dominate
wide-cache   512 wide, 8 layers, 8 heads of 64 without groups (as LLaVA-1.5), vocabulary 512: a step
       reads 84 MB of weights and 32 KB for each cached token, so the cache dominates from 2,600
       tokens on, as it does with LLaVA-1.5-7B (13 GB, 512 KB a token, fp16) from 26,000 on
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from lvlm.export.families.llava import FAMILY

SHAPES: dict[str, dict[str, int]] = {
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "wide-cache": {
        "vocab_size": 512,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    make_model(args.output, args.shape)
    print(args.output)


def make_model(folder: Path, shape: str = "135m") -> tuple[Any, Any]:
    """The configuration and the model in torch, written to ``folder`` if that is empty."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(
        text_config=LlamaConfig(**SHAPES[shape], max_position_embeddings=16384).to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=3,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model: Any = FAMILY.build(config).eval()
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        shipped = Path(__file__).parents[1] / "assets/tiny-llava"
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / name).write_bytes((shipped / name).read_bytes())
        text = '{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, '
        text += '"crop_size": {"height": 336, "width": 336}}'
        (folder / "preprocessor_config.json").write_text(text)
    model.set_attn_implementation("sdpa")
    return config, model


if __name__ == "__main__":
    main()
