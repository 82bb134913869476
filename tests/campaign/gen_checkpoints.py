"""Checkpoint folders: any of their files changed, missing, or something else; dry runs."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

from campaign.case import Base, Case
from campaign.mutate import json_bytes, linked, mutate_bytes, mutate_json, odd_file, replace

WEIGHT = 16
WARM = (
    "lvlm.export.export_cli",
    "lvlm.export.export_plan",
    "lvlm.export.exporter",
    "lvlm.export.estimates",
)
FILES = (
    *("config.json", "config.json", "config.json", "generation_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "processor_config.json", "chat_template.jinja"),
)
SPARE: dict[str, Any] = {
    "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor", "size": 168},
    "special_tokens_map.json": {"eos_token": "</s>", "pad_token": {"content": "<pad>"}},
    "adapter_config.json": {"peft_type": "LORA"},
    "chat_template.json": {"chat_template": "{{ messages }}"},
    "added_tokens.json": {"<x>": 600},
    "model.safetensors.index.json": {"weight_map": {"a": "model.safetensors"}},
}


def make(rng: random.Random, folder: Path, base: Base) -> Case:
    checkpoint = linked(base.checkpoint, folder / "checkpoint")
    match rng.randrange(8):
        case 0:
            odd_file(rng, checkpoint / rng.choice((*FILES, "model.safetensors")))
        case 1 | 2:
            _weights(rng, checkpoint)
        case 3:
            name = rng.choice(sorted(SPARE))
            replace(checkpoint / name, json_bytes(rng, mutate_json(rng, SPARE[name])))
        case _:
            _small_file(rng, checkpoint / rng.choice(FILES))
    out = folder / "out/bundle"
    flags = rng.choice(((), (), ("--dtype", "fp32"), ("-r", "lightvlm"), ("--weights", "int8")))
    return Case(
        "lvlm-export",
        ("-m", str(checkpoint), "-o", str(out), "--dry-run", "-q", *flags),
        output=out,
    )


def _small_file(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    if path.suffix != ".json" or rng.random() < 0.1:
        replace(path, mutate_bytes(rng, data))
        return
    value = json.loads(data)
    if path.name == "generation_config.json" and rng.random() < 0.7:
        names = ("repetition_penalty", "bad_words_ids", "suppress_tokens", "min_new_tokens")
        known: list[Any] = [1.2, [[5]], [5, 6], 2, 0, -1, "x", None, [[]], [[-1]], 1e400, True]
        name = rng.choice((*names, "eos_token_id", "no_repeat_ngram_size"))
        value[name] = rng.choice([*known, [10**9]])
        replace(path, json.dumps(value).encode())
        return
    replace(path, json_bytes(rng, mutate_json(rng, value)))


def _weights(rng: random.Random, checkpoint: Path) -> None:
    """A header with other names, types, shapes or offsets; weights in parts."""
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    match rng.randrange(5):
        case 0:
            replace(path, mutate_bytes(rng, data))
        case 1:
            at = rng.randrange(8 + size)
            replace(path, data[:at] + mutate_bytes(rng, data[at : 8 + size]) + body)
        case 2:
            shard = "model-00001-of-00001.safetensors"
            (checkpoint / shard).symlink_to(path.resolve())
            path.unlink()
            index = {
                "metadata": {"total_size": len(body)},
                "weight_map": dict.fromkeys(header, shard),
            }
            replace(
                checkpoint / "model.safetensors.index.json",
                json_bytes(rng, mutate_json(rng, index)),
            )
        case _:
            text = json.dumps(mutate_json(rng, header)).encode()
            replace(path, struct.pack("<Q", len(text)) + text + body)
