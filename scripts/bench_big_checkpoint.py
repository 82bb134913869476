"""Export a checkpoint of LLaVA-1.5-7B's exact shapes (random fp16 weights); print time and memory.

    python scripts/bench_big_checkpoint.py --work /some/disk/with/30GB

The checkpoint is made once (about 14 GB) and kept in --work; the bundle is removed again.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import save_file

from lvlm.export.checkpoint import find_family

CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "text_config": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
SHARD = 1_000_000_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipe", default="lightvlm")
    args = parser.parse_args()
    folder = args.work / "llava-7b-random"
    if not (folder / "model.safetensors.index.json").exists():
        make_checkpoint(folder)
    stored = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    output = args.work / "llava-7b-bundle"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "lvlm", "export", "-m", str(folder), "-r", args.recipe]
    began = time.perf_counter()
    subprocess.run([*command, "-o", str(output), "--no-validate"], check=True)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"checkpoint            {stored / 1e9:.2f} GB")
    print(f"bundle                {sum(f.stat().st_size for f in output.iterdir()) / 1e9:.2f} GB")
    print(f"time                  {seconds:.0f} s")
    print(f"peak resident memory  {peak / 1e9:.2f} GB")
    print(f"peak / checkpoint     {peak / stored:.3f}")
    shutil.rmtree(output)


def make_checkpoint(folder: Path) -> None:
    """Names as on the hub (older than the model class's own), shards of about 1 GB."""
    print(f"making a random checkpoint in {folder} …", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    family = find_family(CONFIG, "")
    with torch.device("meta"):
        model = family.build(family.read_config(CONFIG))
    noise = torch.empty(300_000_000, dtype=torch.float16).normal_(0, 0.02)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number = 0

    def flush() -> None:
        nonlocal number
        number += 1
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for start, (name, parameter) in enumerate(model.named_parameters()):
        count, begin = parameter.numel(), start * 1009
        shard[hub_name(name)] = noise[begin : begin + count].reshape(parameter.shape).clone()
        if sum(t.numel() * 2 for t in shard.values()) > SHARD:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    shipped = Path(str(resources.files("lvlm.assets") / "tiny-llava"))
    tokenizer = json.loads((shipped / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        if token["content"] == "<image>":
            token["id"] = CONFIG["image_token_index"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    side = {"height": 336, "width": 336}
    processor = {"image_processor_type": "CLIPImageProcessor", "crop_size": side}
    processor["size"] = {"shortest_edge": 336}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def hub_name(name: str) -> str:
    for new, old in (
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise ValueError(name)


if __name__ == "__main__":
    main()
