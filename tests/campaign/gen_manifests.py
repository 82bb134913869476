"""Manifests: any field of lvlm.json changed, hashes right or wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path

from campaign.case import Base, Case
from campaign.mutate import json_bytes, linked, mutate_json, odd_file, replace

WEIGHT = 20
WARM = (
    "lvlm.runtime.model",
    "lvlm.runtime.tools.doctor",
    "lvlm.plugins_trt.engines.engine_builder",
)


def make(rng: random.Random, folder: Path, base: Base) -> Case:
    bundle = linked(base.bundle, folder / "bundle")
    path = bundle / "lvlm.json"
    data = json.loads(path.read_text())
    refused = False
    match rng.randrange(10):
        case 0:
            odd_file(rng, bundle / rng.choice(["lvlm.json", *data["files"]]))
        case 1:
            name = rng.choice(sorted(data["files"]))
            digest = data["files"][name]["sha256"]
            data["files"][name]["sha256"] = digest[::-1]
            replace(path, json.dumps(data).encode())
            refused = digest != digest[::-1]
        case 2:
            part = rng.choice([key for key in data if isinstance(data[key], dict | list)])
            data[part] = mutate_json(rng, data[part]) if data[part] else {"x": 1}
            replace(path, json_bytes(rng, data))
        case _:
            replace(path, json_bytes(rng, mutate_json(rng, data)))
    return command(rng, bundle, base, refused)


def command(rng: random.Random, bundle: Path, base: Base, refused: bool = False) -> Case:
    """A command that reads the bundle; one that answers where damage must be refused."""
    images = ["--image", str(rng.choice(base.images))] if rng.random() < 0.7 else []
    answer = (str(bundle), "What is it?", *images, "--max-new-tokens", "2")
    match 9 if refused else rng.randrange(10):
        case 0 | 1:
            return Case("lvlm-doctor", (str(bundle), *rng.choice([(), ("--json",)])))
        case 2:
            target = rng.choice(("openvino", "trt-11"))
            return Case(
                "lvlm-build", ("engine", str(bundle), "--target", target, "--dry-run", "-q")
            )
        case 3:
            image = str(bundle.parent / "merge.png")
            return Case("lvlm-run", (*answer, "--show-merge", image, "-q"))
        case 4:
            return Case("lvlm-run", (*answer, "--verify", rng.choice(("full", "none"))))
        case _:
            return Case("lvlm-run", answer, refused=refused)
