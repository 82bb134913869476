"""Videos that lose what does not change: against the torch reference, and against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import TINY
from parity_tools import make_reference

import lvlm
from lvlm.runtime.engine import Engine
from lvlm.runtime.media.video import Video
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.prompts import Prompt

MODELS = [name for name, (family, _) in TINY.items() if family.video]
FAMILIES = {name.partition(":")[0]: name for name in reversed(MODELS)}
USUAL = ["smolvlm", "qwen3-vl", "llava-onevision"]  # a frame each, pairs and text between, pooled
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, "chat_template": False}
IMAGES = 4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        some = FAMILIES if metafunc.config.getoption("--whole") else USUAL
        metafunc.parametrize("name", [FAMILIES[family] for family in some])


def moving(frames: int) -> Video:
    """A square that jumps over a still image, farther and farther."""
    rng = np.random.default_rng(1)
    still = rng.integers(0, 256, (64, 96, 3), np.uint8)
    images = [still.copy() for _ in range(frames)]
    for number, image in enumerate(images):
        left = 2 * number * number
        image[20:44, left : left + 24] = 255 - image[20:44, left : left + 24]
    return Video.of(images, 4.0)


def asked(model: Model, images: int = IMAGES) -> tuple[str, Video, dict[str, Any]]:
    video: Any = model.processor.video  # type: ignore[attr-defined]
    source = moving(images * video.per_image)
    all_of_them = list(range(source.frames))
    frames = None if video.sampled(source, None) == all_of_them else source.frames
    return f"USER: {video.token}Describe it. ASSISTANT:", source, {"frames": frames}


def whole(model: Model, text: str, source: Video, frames: int | None) -> Prompt:
    options = GenerationOptions(chat_template=False, frames=frames)
    return model.prepare(0, text, [], options, [source])


def expected_tokens(prompt: Prompt, features: list[np.ndarray], keep: float) -> list[list[int]]:
    """Of every frame the tokens that go on, by loops; the number of each frame's is given by the
    test below."""
    found = [list(range(len(features[0])))]
    for number in range(1, len(features)):
        same = []
        for now, before in zip(features[number], features[number - 1], strict=False):
            dot = sum(float(x) * float(y) for x, y in zip(now, before, strict=True))
            same.append(dot / (math.hypot(*now) * math.hypot(*before)))
        same += [-2.0] * (len(features[number]) - len(same))  # has no place in the frame before
        order = sorted(range(len(same)), key=lambda token: same[token])
        found.append(sorted(order[: prompt_counts(prompt, keep)[number]]))
    return found


def prompt_counts(prompt: Prompt, keep: float) -> list[int]:
    """Tokens of each frame: the first whole, one of each, and the rest by the change of pixels,
    dealt out one by one to the frame that is farthest behind its share."""
    tokens = [image.tokens for image in prompt.images]
    pixels = [image.arrays["pixel_values"].astype(np.float64) for image in prompt.images]
    total = sum(max(1, round(keep * count)) for count in tokens)
    change = [float(np.abs(b - a).mean()) for a, b in pairwise(pixels)]
    rest = max(0, total - tokens[0] - len(change))
    exact = [rest * part / sum(change) for part in change]
    assert max(exact) < tokens[1] - 1  # so that none is full
    given = [math.floor(part) for part in exact]
    left = rest - sum(given)
    again = [left * part / sum(change) for part in change]
    while left:
        if max(math.floor(part) for part in again):
            given = [a + math.floor(b) for a, b in zip(given, again, strict=True)]
            left = rest - sum(given)
            again = [left * part / sum(change) for part in change]
            continue
        order = sorted(range(len(again)), key=lambda i: -again[i])
        for i in order[:left]:
            given[i] += 1
        left = 0
    return [tokens[0], *(1 + count for count in given)]


def test_videos(name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]) -> None:
    reference = make_reference(checkpoint(name), "evs")
    with lvlm.load(bundle(name, "evs", max_images=IMAGES)) as model:
        text, source, how = asked(model)
        full = whole(model, text, source, **how)
        tokens = sum(image.tokens for image in full.images)
        features = model.graphs.encode(full.images)
        for keep in (0.5, 0.4):
            prompt = reference.read_at(full, keep)
            found = [one.indices.tolist() for one in model.graphs.tokens(prompt.images)]
            assert found == expected_tokens(full, features, keep)
            theirs = reference.generate(
                prompt, reference.encode(prompt.images), max_new_tokens=12, keep=keep
            )
            ours = model.generate(text, [], [source], keep=keep, **how, **OPTIONS)
            assert ours.token_ids == theirs.tokens
            assert list(ours.stats.tokens_per_layer) == theirs.entries
            least = full.images[0].tokens + len(full.images) - 1
            assert ours.stats.image_tokens == pytest.approx(max(least, keep * tokens), abs=2)
        shortest = model.generate(text, [], [source], keep=1e-6, **how, **OPTIONS)
        assert shortest.stats.image_tokens == least
        still_image = next(moving(1).read([0]))
        everything = model.generate(text, [], [source], keep=1.0, **how, **OPTIONS)
        still = model.generate("USER: <image>\nHi", [still_image], **OPTIONS)
    with lvlm.load(bundle(name, max_images=IMAGES)) as model:
        assert (
            everything.token_ids == model.generate(text, [], [source], **how, **OPTIONS).token_ids
        )
        none = model.generate("USER: <image>\nHi", [still_image], **OPTIONS)
    assert still.token_ids == none.token_ids


def test_frames_one_at_a_time(bundle: Callable[..., Path]) -> None:
    """In an engine that reads in chunks, frames are encoded one by one, each once; a longer video
    that begins alike finds its first frames encoded."""
    folder = bundle(FAMILIES["smolvlm"], "evs", max_images=IMAGES)
    with lvlm.load(folder) as model, Engine(folder, slots=2, chunk_tokens=32) as engine:
        for images in (3, IMAGES):
            text, source, how = asked(model, images)
            mine = engine.generate(text, [], [source], **how, **OPTIONS)
            assert mine.token_ids == model.generate(text, [], [source], **how, **OPTIONS).token_ids
        text, source, how = asked(model, 3)
        again = engine.generate(text, [], [source], **how, **OPTIONS)
        assert again.stats.reused_tokens > again.stats.image_tokens
