"""Qwen-VL prompts that end with an image or a video: a new token's three positions differ there, in
transformers' generate and so in the torch reference; graphs get one, and moved prompts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import transformers_inputs
from parity_tools import load_torch, make_reference
from qwen_tools import LIGHT, image, recorded, uncompressed
from settings import LIGHTVLM
from transformers import AutoModelForImageTextToText
from video_tools import inputs as video_inputs
from video_tools import noise_video

import lvlm
from lvlm.core.progress import Progress
from lvlm.export.targets.openvino import TARGET as OPENVINO
from lvlm.plugins_trt.engines.lowered_graphs import lower_bundle
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.engine import Engine
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.prompts import Prompt

WIDE, TALL = image(40, 130), image(110, 30)
# The first two end with an image, the longest one does not.
ROWS: list[tuple[str, list[np.ndarray]]] = [
    ("USER: Describe this: <image>", [WIDE]),
    ("<image> and <image>", [WIDE, TALL]),
    ("USER: <image>\nWhich digit is in the top row of the picture? ASSISTANT:", [TALL]),
]
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, "chat_template": False}
# Device and dtype, and how far logits may be off as a part of the largest one; bf16 needs OpenVINO.
OTHER_DEVICES = [("openvino", "fp32", 1e-4)]
ALL_DEVICES = [
    *OTHER_DEVICES,
    ("cpu", "fp16", 0.01),
    ("openvino", "fp16", 0.01),
    ("openvino", "bf16", 0.08),
]
LAYER0 = ("elastic-cache", "kv_keep=0.5", "positions=layer0")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole")
        names, devices = (LIGHT, ALL_DEVICES) if whole else (LIGHT[:1], OTHER_DEVICES)
        cases = [(name, *device) for name in names for device in devices]
        metafunc.parametrize(("name", "device", "dtype", "part"), cases)


def prepare(model: Model, text: str, images: Sequence[np.ndarray]) -> Prompt:
    prompt = model.prepare(0, text, images, GenerationOptions(**OPTIONS))
    apart = prompt.image_id[-1] > 0
    assert bool((prompt.aligned != prompt.positions).any()) == apart
    return prompt


def generated(theirs: Any, ids: torch.Tensor, **inputs: torch.Tensor) -> tuple[Any, Any]:
    """Greedy tokens [B,steps] of transformers' generate and their logits, a step each."""
    out = theirs.generate(
        input_ids=ids,
        **inputs,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, ids.shape[1] :].tolist(), out.logits


@pytest.mark.parametrize("name", LIGHT)
def test_none_equals_transformers_generate(
    name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """In a ragged batch, as transformers pads one, and every row alone; in the engine, too."""
    theirs, folder = load_torch(checkpoint(name)), bundle(name, max_images=2)
    texts, images = [r[0] for r in ROWS], [r[1] for r in ROWS]
    with lvlm.load(folder) as model:
        prompts = [prepare(model, *row) for row in ROWS]
        given = [transformers_inputs(checkpoint(name), prompt) for prompt in prompts]
        tokens, logits = generated(theirs, **left_padded(prompts, given))
        batch = model.calls.start(prompts)
        for number, step in enumerate(logits, 1):
            np.testing.assert_allclose(batch.logits, step.numpy(), atol=1e-4)
            if number < len(logits):
                batch.feed([row[number - 1] for row in tokens])
        assert [g.token_ids for g in model.generate(texts, images, **OPTIONS)] == tokens
        alone = [model.generate(*row, **OPTIONS).token_ids for row in ROWS]
    assert alone == tokens
    with Engine(folder, slots=2) as engine:
        handles = [engine.submit(*row, **OPTIONS) for row in ROWS]
        assert [handle.result(60).token_ids for handle in handles] == tokens


def test_other_types_and_devices(
    name: str,
    device: str,
    dtype: str,
    part: float,
    checkpoint: Callable[[str], Path],
    bundle: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Logits of transformers with weights of that type, a step each, as it is fed its tokens."""
    folder = bundle(name, dtype=dtype, max_images=2)
    if device == "openvino":
        folder = Path(shutil.copytree(folder, tmp_path / "bundle"))
        lower_bundle(folder, read_bundle(folder), OPENVINO, Progress(0, quiet=True))
    kept = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    theirs = AutoModelForImageTextToText.from_pretrained(checkpoint(name), dtype=kept)
    with lvlm.load(folder, device=device, threads=1) as model:
        prompts = [prepare(model, *row) for row in ROWS]
        given = [transformers_inputs(checkpoint(name), prompt) for prompt in prompts]
        tokens, logits = generated(theirs.float().eval(), **left_padded(prompts, given))
        batch = model.calls.start(prompts)
        for step, expected in enumerate(logits):
            limit = part * float(expected.abs().max())
            np.testing.assert_allclose(batch.logits, expected.numpy(), rtol=0, atol=limit)
            if step + 1 < len(logits):
                batch.feed([answer[step] for answer in tokens])


def left_padded(
    prompts: Sequence[Prompt], given: Sequence[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    longest = max(len(p.ids) for p in prompts)
    rows = [(longest - len(p.ids), torch.tensor(list(p.ids))) for p in prompts]
    pad = torch.nn.functional.pad
    return {
        "ids": torch.stack([pad(ids, (n, 0)) for n, ids in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(ids), (n, 0)) for n, ids in rows]),
        "mm_token_type_ids": torch.stack(
            [pad(g["mm_token_type_ids"][0], (n, 0)) for g, (n, _) in zip(given, rows, strict=True)]
        ),
        "pixel_values": torch.cat([g["pixel_values"] for g in given]),
        "image_grid_thw": torch.cat([g["image_grid_thw"] for g in given]),
    }


# Qwen3-VL has text behind every frame.
@pytest.mark.parametrize("name", [name for name in LIGHT if not name.startswith("qwen3")])
def test_a_video_at_the_end(
    name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """Also one so slow that its last frame's time is larger than any position decode knows."""
    theirs = load_torch(checkpoint(name))
    with lvlm.load(bundle(name, max_images=2)) as model:
        video = model.processor.video  # type: ignore[attr-defined]
        for source in (noise_video(4, 4.0, 30, 90), noise_video(4, 0.001)):
            frames = (
                None if video.sampled(source, None) == list(range(source.frames)) else source.frames
            )
            options = GenerationOptions(**OPTIONS, frames=frames)
            text = f"USER: What happens? {video.token}"
            prompt = model.prepare(0, text, [], options, [source])
            assert prompt.next_position <= len(prompt.ids)
            given = video_inputs(prompt, name.partition(":")[0], source)
            tokens, logits = generated(theirs, torch.tensor([list(prompt.ids)]), **given)
            batch = model.calls.start([prompt])
            for number, step in enumerate(logits, 1):
                np.testing.assert_allclose(batch.logits, step.numpy(), atol=2e-3)
                if number < len(logits):
                    batch.feed([row[number - 1] for row in tokens])
            got = model.generate(text, [], [source], frames=frames, **OPTIONS)
            assert [got.token_ids] == tokens


@pytest.mark.parametrize(
    ("name", "recipe"),
    [*((name, LIGHTVLM) for name in LIGHT), (LIGHT[0], LAYER0)],
    ids=[*LIGHT, "layer0"],
)
def test_recipes_equal_their_torch_reference(
    name: str,
    recipe: tuple[str, ...],
    checkpoint: Callable[[str], Path],
    bundle: Callable[..., Path],
) -> None:
    """The reference keeps the three positions apart, as generate does."""
    reference = make_reference(checkpoint(name), *recipe)
    with lvlm.load(bundle(name, *recipe, max_images=2)) as model:
        for text, images in ROWS[:2]:
            prompt, seen = prepare(model, text, images), []
            with recorded(reference.language.rotaries[0], seen):
                features = reference.encode(prompt.images)
                answer = reference.generate(prompt, features, max_new_tokens=12)
            if recipe != LAYER0:
                full = uncompressed(checkpoint(name), prompt, 4)
                for mine, theirs in zip(seen[1 + len(answer.maps) :], full[1:], strict=False):
                    np.testing.assert_array_equal(mine, theirs)
                assert (full[1] != full[1][0]).any()
            assert model.generate(text, images, **OPTIONS).token_ids == answer.tokens


def test_the_engine_does_not_go_on_from_a_moved_prompt(bundle: Callable[..., Path]) -> None:
    """Entries of a prompt that ends with an image, then text behind the same image."""
    folder, (text, images) = bundle(LIGHT[0], max_images=2), ROWS[0]
    longer = text + "?"
    with lvlm.load(folder) as model:
        expected = [model.generate(t, images, **OPTIONS) for t in (text, longer, longer)]
    with Engine(folder, slots=2) as engine:
        got = [engine.generate(t, images, **OPTIONS) for t in (text, longer, longer)]
    assert [g.token_ids for g in got] == [g.token_ids for g in expected]
    first, second, third = (g.stats.reused_tokens for g in got)
    assert first == second == 0 < third


def test_prompts_that_are_moved_unlike_share_nothing(bundle: Callable[..., Path]) -> None:
    """The same text before images of two shapes: its entries lie at two distances."""
    folder, text = bundle(LIGHT[0], max_images=2), ROWS[0][0]
    asked = [(text, [image]) for image in (WIDE, TALL, WIDE)]
    with lvlm.load(folder) as model:
        prompts = [prepare(model, *one) for one in asked]
        moves = [(p.aligned - p.positions)[:, 0].tolist() for p in prompts]
        expected = [model.generate(*one, **OPTIONS).token_ids for one in asked]
    assert moves[0] == moves[2] != moves[1]
    with Engine(folder, slots=3) as engine:
        got = [engine.generate(*one, **OPTIONS) for one in asked]
    assert [g.token_ids for g in got] == expected
    first, second, third = (g.stats.reused_tokens for g in got)
    assert first == second == 0 < third
