"""Bundles with graphs for OpenVINO, and steps of decoding over them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from settings import ASSETS, AT_ENCODER, CACHED

from lvlm.core.progress import Progress
from lvlm.export.targets.openvino import TARGET
from lvlm.plugins_trt.engines.lowered_graphs import lower_bundle
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions

Make = Callable[..., Path]
SAMPLES = [ASSETS / f"samples/digits-{i}.png" for i in (1, 2)]
PROMPTS = ["Describe the picture.", "Read the top row.", "Hi"]
IMAGES = [SAMPLES[:1], SAMPLES, []]
SMALL = "llava:llama-mha-bias-rope3-siglip"


def lowering(bundle: Make, temporary: pytest.TempPathFactory) -> Make:
    """Makes copies of bundles that other tests use, too, with graphs for the target."""
    made: dict[tuple[str, str, str, bool], Path] = {}

    def make(
        recipe: str = "none",
        model: str = "digits-llava",
        dtype: str = "fp32",
        sessions: bool = False,
    ) -> Path:
        key = (recipe, model, dtype, sessions)
        if key not in made:
            folder = temporary.mktemp("openvino") / "bundle"
            settings = (CACHED | AT_ENCODER).get(recipe, ())
            options = {"dtype": dtype, "max_images": 2, **({"sessions": True} if sessions else {})}
            shutil.copytree(bundle(model, *settings, **options), folder)
            lower_bundle(folder, read_bundle(folder), TARGET, Progress(1, quiet=True))
            made[key] = folder
        return made[key]

    return make


def decode_steps(model: Model, steps: int) -> list[np.ndarray]:
    """Logits of the three prompts after each of some steps."""
    prompts = [
        model.prepare(0, p, i, GenerationOptions()) for p, i in zip(PROMPTS, IMAGES, strict=True)
    ]
    batch = model.calls.start(prompts)
    logits = [batch.logits.copy()]
    for _ in range(steps):
        batch.feed([5] * len(prompts))
        logits.append(batch.logits.copy())
    return logits
