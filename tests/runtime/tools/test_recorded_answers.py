"""Recorded answers: what an export leaves, and what a device is found to answer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recording import record

import lvlm
from lvlm.core.errors import BundleError
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.tools.recorded_answers import (
    RecordedAnswer,
    RecordedStep,
    agree,
    compare,
    highest,
    limit_of,
    recorded_answers,
)


def test_the_highest_logits_fall() -> None:
    logits = np.arange(40, dtype=np.float32) % 7
    step = highest(logits)
    assert list(step.logits) == sorted(logits, reverse=True)[: len(step.ids)]
    assert [logits[i] for i in step.ids] == list(step.logits)


def test_a_device_that_answers_otherwise_is_told(bundle: Callable[..., Path]) -> None:
    folder = bundle("digits-llava", max_images=2)
    right = record(folder)
    first = right.steps[0]
    scale = max(map(abs, first.logits))
    moved = RecordedStep(first.ids, tuple(x + 2 * scale for x in first.logits))
    other = RecordedStep((*first.ids[1:], first.ids[0]), first.logits)
    unclear = RecordedStep(
        other.ids, tuple(first.logits[0] - 1e-4 * i for i in range(len(first.ids)))
    )
    wrong = [
        dataclasses.replace(right, steps=(step, *right.steps[1:]))
        for step in (moved, other, unclear)
    ]
    shown = dataclasses.replace(right, ids=(2, *right.ids[1:]))
    with lvlm.load(folder) as model:
        good, apart, unlike, near, ids = compare(model, [right, *wrong, shown])
    assert good.passed
    assert max(good.apart) < 1e-5
    assert not apart.passed
    assert (apart.unlike, max(apart.apart) > 0.5) == (0, True)
    assert unlike.unlike == 1
    assert not unlike.passed
    assert near.unlike == 0  # of two that are alike either may be chosen
    assert "token ids differ" in ids.problem
    assert str(good).startswith("✓ samples/digits-1.png: 4 of 4 tokens")
    assert str(unlike).startswith("✗ samples/digits-1.png: 3 of 4 tokens")
    assert agree(model.manifest, [good])
    assert not agree(model.manifest, [good, unlike])
    assert good.limit == 1e-2
    held = dataclasses.replace(model.manifest, cache_dtype="int8")
    assert limit_of(held) == 2e-2  # that of exports


def test_of_a_recipe_that_ranks_one_image_is_enough(bundle: Callable[..., Path]) -> None:
    folder = bundle("digits-llava", "elastic-cache", "kv_keep=1.0", max_images=2)
    right = record(folder)
    wrong = dataclasses.replace(right, ids=(2, *right.ids[1:]))
    with lvlm.load(folder) as model:
        found = compare(model, [wrong, right])
    assert agree(model.manifest, found)
    assert not agree(model.manifest, found[:1])


def test_a_bundle_without_any(bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Exported without validation, and as older versions did."""
    folder = shutil.copytree(bundle("digits-llava", max_images=2), tmp_path / "b")
    manifest = read_bundle(folder)
    for content in ({"checks": []}, [], None):
        with pytest.raises(BundleError, match="holds no recorded answers"):
            recorded_answers(folder, manifest)
        (folder / "validation.json").write_text(json.dumps(content))
        files = manifest.files | {"validation.json": manifest.files["vision.onnx"]}
        manifest = dataclasses.replace(manifest, files=files)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"steps": ()}, "has 4 tokens and 0 steps"),
        ({"tokens": ()}, "has 0 tokens and 4 steps"),
        ({"tokens": (9, 10, 11, 2**40)}, "outside of the vocabulary"),
        ({"steps": (RecordedStep((5, -1), (2.0, 1.0)),) * 4}, "outside of the vocabulary"),
        ({"steps": (RecordedStep((5, 6), (1.0,)),) * 4}, "ids and logits are not as many"),
        ({"steps": (RecordedStep((), ()),) * 4}, "ids and logits are not as many, or none"),
        ({"steps": (RecordedStep((5,), (float("nan"),)),) * 4}, "not finite"),
        ({"image": "../../lvlm.json"}, "no shipped image"),
        ({"image": "/etc/passwd"}, "no shipped image"),
        ({"image": "samples"}, "no shipped image"),
    ],
)
def test_records_that_no_export_writes(
    change: dict[str, Any], problem: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Whoever wrote them gave their hash as well."""
    manifest = read_bundle(bundle("digits-llava", max_images=2))
    step = RecordedStep((5, 6), (2.0, 1.0))
    right = RecordedAnswer(
        "samples/digits-1.png", "Hi", False, (1, 2), (9, 10, 11, 12), (step,) * 4
    )
    files = manifest.files | {"validation.json": manifest.files["vision.onnx"]}
    manifest = dataclasses.replace(manifest, files=files)
    for answer in (right, dataclasses.replace(right, **change)):
        text = json.dumps({"answers": [dataclasses.asdict(answer)]})
        (tmp_path / "validation.json").write_text(text)
        if answer is right:
            assert recorded_answers(tmp_path, manifest) == [right]
            continue
        with pytest.raises(BundleError, match=problem):
            recorded_answers(tmp_path, manifest)
