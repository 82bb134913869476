"""The fraction of the cache that a variant is evaluated at."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluation_tools import HOW, IMAGE_TOKENS, LAYERS, records
from hypothesis import given
from hypothesis import strategies as st

from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
from lvlm.calibration.evaluate.fit import SampleShape, new_tokens, solve_keep
from lvlm.calibration.evaluate.variant_runner import BundleRunner
from lvlm.calibration.evaluate.variants import Bundle, Variant, variants
from lvlm.core.errors import CapacityError
from lvlm.runtime.bundle.manifest import Reduction
from lvlm.runtime.kv.image_tokens import keep_ratios, tokens_per_layer
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions


def test_kept_fraction_is_exact(
    full: Bundle, light: Bundle, uniform: Bundle, samples: list[EvaluationSample], tmp_path: Path
) -> None:
    lengths = [IMAGE_TOKENS + s.text_tokens for s in map(BundleRunner(full, HOW).shape, samples)]
    assert all(r.kept == 1 for r in records(Variant(full, ""), "greedy", samples, tmp_path))
    for run in ("forced", "greedy"):
        found = records(Variant(uniform, "", kv_keep=0.3), run, samples, tmp_path)
        assert [r.kept for r in found] == pytest.approx([round(0.3 * n) / n for n in lengths])
    ratios = keep_ratios(light.manifest.reductions, 1.0, 0.2)
    image = tokens_per_layer(light.manifest.reductions, ratios, IMAGE_TOKENS, LAYERS)
    expected = [(sum(image) / LAYERS + n - IMAGE_TOKENS) / n for n in lengths]
    found = records(Variant(light, "", keep=0.2), "forced", samples, tmp_path)
    assert [r.kept for r in found] == pytest.approx(expected)
    (variant,) = variants([light], [], [0.3])
    found = records(variant, "forced", samples, tmp_path)
    assert [r.kept for r in found] == pytest.approx([math.ceil(0.3 * n) / n for n in lengths])
    assert all(r.keep is None for r in found)


def test_kept_is_of_the_whole_prompt_where_the_encoder_shortens_it(
    bundle: Callable[..., Path], samples: list[EvaluationSample], tmp_path: Path
) -> None:
    thinned = Bundle.read(bundle("digits-llava", "divprune", max_images=2))
    text = BundleRunner(thinned, HOW).shape(samples[2]).text_tokens
    (found,) = records(Variant(thinned, "", keep=0.25), "greedy", samples[2:], tmp_path)
    assert found.kept == pytest.approx((36 + text) / (144 + text))


def test_a_wanted_fraction_is_reached_by_merging(
    light: Bundle, samples: list[EvaluationSample], tmp_path: Path
) -> None:
    (variant,) = variants([light], [0.5], [])
    shapes = [BundleRunner(light, HOW).shape(sample) for sample in samples]
    found = records(variant, "forced", samples, tmp_path, dataclasses.replace(HOW, batch=2))
    for record, shape in zip(found, shapes, strict=True):
        assert record.kept is not None
        assert abs(record.kept - 0.5) * (IMAGE_TOKENS + shape.text_tokens) <= 1
        assert record.keep == solve_keep(light.manifest, shape, 0.5).keep
    assert len({record.keep for record in found}) > 1  # each prompt has its own


@given(
    text=st.integers(1, 400),
    image=st.integers(1, 3000),
    stages=st.sets(st.integers(1, 11), min_size=1, max_size=4),
    wanted=st.floats(0.01, 1.0),
)
def test_solved_keep_gives_the_fraction_within_one_token(
    text: int, image: int, stages: set[int], wanted: float
) -> None:
    reductions = tuple(
        Reduction(layer, (i + 1) / len(stages), None, 0.1) for i, layer in enumerate(sorted(stages))
    )
    manifest: Any = SimpleNamespace(
        shortenings=reductions, keep=0.35, text=SimpleNamespace(layers=12)
    )
    reach = solve_keep(manifest, SampleShape(text, (image,), (1,)), wanted)
    length = text + image
    first = min(stages)
    assert reach.min_kept == pytest.approx((12 * text + first * image + 12 - first) / 12 / length)
    if reach.keep is None:
        assert wanted * length < reach.min_kept * length - 1 + 1e-6
        return
    ratios = keep_ratios(reductions, 0.35, reach.keep)
    left = text + sum(tokens_per_layer(reductions, ratios, image, 12)) / 12
    assert abs(left - wanted * length) <= 1 + 1e-6
    # Not at the edge of a count: a rounded copy of the number does the same
    ratios = keep_ratios(reductions, 0.35, float(f"{reach.keep:.12g}"))
    assert text + sum(tokens_per_layer(reductions, ratios, image, 12)) / 12 == left


def test_out_of_reach_is_recorded_and_nothing_is_run(
    light: Bundle, samples: list[EvaluationSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BundleRunner, "run", None)
    (variant,) = variants([light], [0.1], [])
    found = records(variant, "greedy", samples, tmp_path)
    assert [r.kept for r in found] == [None] * 3
    # Text, one of the blocks before the first reduction, one token in each of the others
    shapes = map(BundleRunner(light, HOW).shape, samples)
    least = [
        (s.text_tokens + (IMAGE_TOKENS + LAYERS - 1) / LAYERS) / (IMAGE_TOKENS + s.text_tokens)
        for s in shapes
    ]
    assert [r.least for r in found] == pytest.approx(least)


def test_what_does_not_fit_is_known_before_anything_is_run(
    full: Bundle, samples: list[EvaluationSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BundleRunner, "run", None)
    how = dataclasses.replace(HOW, max_new_tokens=5000)
    with pytest.raises(CapacityError, match=r"digits sample 1: .* of 5000 new tokens"):
        records(Variant(full, "full cache"), "greedy", samples, tmp_path, how)
    crowded = dataclasses.replace(samples[1], images=samples[1].images * 3, where="line 7")
    with pytest.raises(CapacityError, match=r"line 7: .* 0 of \d+ new tokens; .*--max-images 2"):
        records(Variant(full, ""), "forced", [samples[0], crowded], tmp_path)


@pytest.mark.parametrize("more", [-1, 0, 1, 20, 10_000])
@pytest.mark.parametrize("kv_keep", [0.2, 1.0])
def test_room_is_what_the_engine_gives(
    uniform: Bundle, samples: list[EvaluationSample], kv_keep: float, more: int
) -> None:
    """``more``: slots per layer beyond what is kept of the prompt."""
    shape = BundleRunner(uniform, HOW).shape(samples[0])
    kept = round(kv_keep * (IMAGE_TOKENS + shape.text_tokens))
    capacity = dataclasses.replace(
        uniform.manifest.capacity, per_layer=(kept + more,) * LAYERS, max_text_len=300
    )
    manifest = dataclasses.replace(uniform.manifest, capacity=capacity)
    wanted = 5000
    with Model(uniform.folder) as model:
        model.graphs.manifest = manifest
        options = GenerationOptions(max_new_tokens=wanted)
        prompt = model.prepare(0, samples[0].prompt, samples[0].images, options)
        try:
            limit = model.calls.start([prompt], None, kv_keep).running[0].row.limit
        except CapacityError:
            limit = 0
    assert new_tokens(manifest, shape, None, kv_keep, wanted) == limit
    assert (limit == 0) == (more < 0)
