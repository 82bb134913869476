"""Files of samples for lvlm-eval and lvlm-calibrate."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from campaign.case import Base, Case
from campaign.mutate import ODD, json_bytes, mutate_bytes, mutate_json, odd_file

WEIGHT = 8
WARM = (
    "lvlm.runtime.model",
    "lvlm.calibration.evaluate.study",
    "lvlm.calibration.datasets.evaluation_samples",
)


def make(rng: random.Random, folder: Path, base: Base) -> Case:
    path = folder / f"data.{rng.choice(('jsonl', 'jsonl', 'jsonl', 'json', 'txt', 'csv'))}"
    lines = [_line(rng, base) for _ in range(rng.randint(0, 3))]
    data = rng.choice((b"\n", b"\r\n", b"\n\n")).join(lines)
    path.write_bytes(mutate_bytes(rng, data) if rng.random() < 0.2 else data)
    if rng.random() < 0.05:
        odd_file(rng, path)
    if rng.random() < 0.5:
        return Case("read_samples", (str(path),), lambda: _read(path))
    layout = ("--format", rng.choice(("jsonl", "llava-detail", "mm-vet"))) * (rng.random() < 0.5)
    flags = ("--metrics", rng.choice(("ppl", "accuracy")), "-q", *layout)
    out = ("-o", str(folder / "results"))
    return Case("lvlm-eval", (str(base.bundle), "--data", str(path), *flags, *out))


def _read(path: Path) -> None:
    from lvlm.export.budgets.calibration_samples import read_samples

    read_samples(path)


def _line(rng: random.Random, base: Base) -> bytes:
    image = str(rng.choice(base.images))
    value: dict[str, Any] = {
        "image": rng.choice((image, [image], image, "missing.png", [])),
        "prompt": rng.choice(("What is it?", "<image> What?", "", "</s>", "\ud800")),
        "answer": rng.choice(("A cat.", "", "7", "x" * 3000)),
    }
    if rng.random() < 0.3:
        value[rng.choice(sorted(value))] = rng.choice(ODD)
    if rng.random() < 0.6:
        return json.dumps(value).encode()
    return json_bytes(rng, mutate_json(rng, value))
