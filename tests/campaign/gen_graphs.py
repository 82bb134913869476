"""Graphs whose bytes are damaged: refused by their hash, or loaded with the right one."""

from __future__ import annotations

import json
import random
from pathlib import Path

from campaign.case import Base, Case
from campaign.gen_manifests import command
from campaign.mutate import linked, mutate_bytes, replace

WEIGHT = 8
WARM = ("lvlm.runtime.model",)


def make(rng: random.Random, folder: Path, base: Base) -> Case:
    bundle = linked(base.bundle, folder / "bundle")
    return damaged(rng, bundle, base, sorted(p.name for p in bundle.iterdir() if ".onnx" in p.name))


def damaged(rng: random.Random, bundle: Path, base: Base, names: list[str]) -> Case:
    """One of the files changed; in half of the cases the manifest gets its right hash."""
    from lvlm.core.integrity import describe

    path = bundle / rng.choice(names)
    before = path.read_bytes()
    after = mutate_bytes(rng, before)
    replace(path, after)
    if rng.random() < 0.5:
        manifest = bundle / "lvlm.json"
        data = json.loads(manifest.read_text())
        data["files"][path.name] = vars(describe(path))
        replace(manifest, json.dumps(data).encode())
        return command(rng, bundle, base)
    return command(rng, bundle, base, refused=before != after)
