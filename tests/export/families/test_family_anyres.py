"""LLaVA-NeXT and LLaVA-OneVision: what is refused by name, and fewer tokens per image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import TINY, their_answer, transformers_inputs
from parity_tools import load_torch

import lvlm
from lvlm.core.errors import CheckpointError, ParameterError
from lvlm.export.families.family import Family
from lvlm.runtime.options.generation_options import GenerationOptions

NEXT, ONEVISION = "llava-next:mistral-gqa", "llava-onevision:qwen2-gqa-tied-siglip"
UNITS = {NEXT: 5, ONEVISION: 7}  # of the largest resolution, and the whole image


def raw(name: str) -> tuple[Family, dict[str, Any]]:
    family, config = TINY[name]
    return family, json.loads(config.to_json_string(use_diff=False))


@pytest.mark.parametrize("name", [NEXT, ONEVISION])
@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("text_config", {"model_type": "gemma"}, "text backbone 'gemma'"),
        ("vision_config", {"model_type": "pixtral"}, "vision tower 'pixtral'"),
        ("text_config", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type 'dynamic'"),
        (None, {"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_unsupported_parts(name: str, part: str | None, change: Any, problem: str) -> None:
    family, config = raw(name)
    (config[part] if part else config).update(change)
    with pytest.raises(CheckpointError, match=problem):
        family.read_config(config)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (NEXT, {"vision_feature_select_strategy": "full"}, "17 features of 4 x 4 patches"),
        (ONEVISION, {"vision_feature_select_strategy": "default"}, "24 features of 5 x 5 patches"),
        (ONEVISION, {"vision_aspect_ratio": "pad"}, "vision_aspect_ratio 'pad'"),
        (ONEVISION, {"vision_aspect_ratio": "anyres_max_0"}, "anyres_max_N"),
    ],
)
def test_unsupported_options(name: str, change: dict[str, Any], problem: str) -> None:
    family, config = raw(name)
    with pytest.raises(CheckpointError, match=problem):
        family.read_config(config | change)


def test_files_of_two_models(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint(NEXT), tmp_path / "mixed")
    path = folder / "preprocessor_config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps(given | {"image_grid_pinpoints": [[56, 56]]}))
    family, config = TINY[NEXT]
    with pytest.raises(CheckpointError, match="image_grid_pinpoints"):
        family.images(config, folder)


@pytest.mark.parametrize("name", [NEXT, ONEVISION])
def test_images_of_other_shapes_equal_transformers_generate(
    name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """Rows whose images give different numbers of tokens, in one batch; alone in transformers."""
    rng = np.random.default_rng(3)
    shapes = [[(20, 300)], [(250, 31), (90, 60)], [(1, 1)], [(700, 640)]]
    rows = [[rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in row] for row in shapes]
    texts = [f"USER: {'<image>' * len(row)} What is it? ASSISTANT:" for row in rows]
    theirs, expected, counts = load_torch(checkpoint(name)), [], set()
    with lvlm.load(bundle(name, max_images=2)) as model:
        for text, row in zip(texts, rows, strict=True):
            prompt = model.prepare(0, text, row, GenerationOptions(chat_template=False))
            counts |= {image.tokens for image in prompt.images}
            given = transformers_inputs(checkpoint(name), prompt)
            expected.append(their_answer(theirs, prompt.ids, given, max_new_tokens=16))
        got = model.generate(texts, rows, max_new_tokens=16, chat_template=False)
    assert [answer.token_ids for answer in got] == expected
    assert len(counts) > 3


@pytest.mark.parametrize("name", [NEXT, ONEVISION])
def test_fewer_tokens_per_image(
    name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """A bundle with --max-image-tokens still says what transformers says of the same tiles."""
    most = {NEXT: 60, ONEVISION: 90}[name]
    image = np.random.default_rng(0).integers(0, 256, (150, 190, 3), np.uint8)
    with lvlm.load(bundle(name, max_image_tokens=most)) as model:
        images = model.manifest.images
        assert images.tokens <= most
        assert images.max_dims["units"] < UNITS[name]
        options = GenerationOptions(chat_template=False)
        prompt = model.prepare(0, "USER: <image>\nWhat is it? ASSISTANT:", [image], options)
        assert prompt.images[0].tokens <= most
        batch = model.calls.start([prompt])
        logits = batch.logits[0].copy()
    theirs = load_torch(checkpoint(name))
    with torch.no_grad():
        ids = torch.tensor([list(prompt.ids)])
        expected = theirs(input_ids=ids, **transformers_inputs(checkpoint(name), prompt)).logits
    np.testing.assert_allclose(logits, expected[0, -1].numpy(), atol=2e-3)
    family, config = TINY[name]
    with pytest.raises(ParameterError, match="at least"):
        family.bounded(family.images(config, checkpoint(name)), 20)
