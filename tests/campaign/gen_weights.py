"""Weights and small files of a bundle with damaged bytes: refused by their hash, or with it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from campaign.case import Base, Case
from campaign.gen_graphs import damaged
from campaign.gen_manifests import command
from campaign.mutate import json_bytes, linked, mutate_json, replace

WEIGHT = 8
WARM = ("lvlm.runtime.model",)
SMALL = ("tokenizer.json", "tokenizer_config.json", "processor_config.json")


def make(rng: random.Random, folder: Path, base: Base) -> Case:
    bundle = linked(base.bundle, folder / "bundle")
    if rng.random() < 0.5:
        return damaged(rng, bundle, base, ["weights.bin"])
    return _other_tokenizer(rng, bundle, base)


def _other_tokenizer(rng: random.Random, bundle: Path, base: Base) -> Case:
    from lvlm.core.integrity import describe

    path = bundle / ("tokenizer.json" if rng.random() < 0.8 else rng.choice(SMALL))
    replace(path, json_bytes(rng, mutate_json(rng, json.loads(path.read_text()))))
    manifest = bundle / "lvlm.json"
    data = json.loads(manifest.read_text())
    data["files"][path.name] = vars(describe(path))
    replace(manifest, json.dumps(data).encode())
    return command(rng, bundle, base)
