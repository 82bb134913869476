"""What goes wrong with a compressed cache, and what is a corner but not wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from settings import ASSETS, CACHED

import lvlm
from lvlm.core.errors import BackendError, ParameterError
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.run_cli import main

IMAGE = np.asarray(Image.open(ASSETS / "samples/digits-1.png"))
ELASTIC = CACHED["elastic-cache (cached)"]
INTERVAL = CACHED["lightvlm (cached)"]


@pytest.fixture(scope="module")
def elastic(bundle: Callable[..., Path]) -> Iterator[Model]:
    with lvlm.load(bundle("digits-llava", *ELASTIC, max_images=2), threads=1) as model:
        yield model


@pytest.mark.parametrize("kv_keep", [0, 1.01, -0.2, float("nan"), "half", True])
def test_kv_keep_out_of_range(elastic: Model, kv_keep: Any) -> None:
    with pytest.raises(ParameterError, match=r"kv_keep is .*; give a number above 0 and up to 1"):
        elastic.generate("Hello", kv_keep=kv_keep)


def test_kv_keep_for_a_bundle_without_compression(bundle: Callable[..., Path]) -> None:
    with lvlm.load(bundle("digits-llava", max_images=2), threads=1) as model:
        with pytest.raises(ParameterError, match="needs a bundle with cache compression"):
            model.generate("Hello", kv_keep=0.5)
        assert model.generate("Hello", kv_keep=1.0, max_new_tokens=2).token_ids


def test_the_command_line_says_it_in_one_line(
    bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bundle("digits-llava", *ELASTIC, max_images=2)
    assert main([str(folder), "Hello", "--kv-keep", "2"]) == 2
    error = capsys.readouterr().err
    assert "kv_keep is 2.0" in error
    assert len(error.strip().splitlines()) == 1


def test_a_kept_prompt_shorter_than_the_distance(elastic: Model) -> None:
    """The fixed point is its middle then, down to a single entry beside the sink."""
    for kv_keep in (0.01, 0.2):
        answer = elastic.generate(
            "Hi", max_new_tokens=40, kv_keep=kv_keep, chat_template=False, stop=()
        )
        n = answer.stats.prompt_tokens
        assert n < 25
        assert answer.stats.kept_per_layer == (max(2, round(kv_keep * n)),) * 6
    prompt = elastic.prepare(0, "Hi", [], GenerationOptions(chat_template=False))
    batch = elastic.calls.start([prompt], kv_keep=0.2)
    counts, sinks = batch.running[0].counts, 1
    kept = int(counts.kept[0, 0])
    assert counts.budgets.fixed_point(counts.kept)[0, 0] == max(sinks, kept // 2)


@pytest.mark.parametrize("recipe", ["elastic-cache (cached)", "lightvlm (cached)"])
def test_prompts_of_one_token_and_some(recipe: str, bundle: Callable[..., Path]) -> None:
    """They run to the end, alone as in a batch; a shorter answer is a longer one's beginning."""
    with lvlm.load(bundle("digits-llava", *CACHED[recipe], max_images=2), threads=1) as model:
        for text, keep in product(("a", "ab", "Hello there, what now?"), (0.01, 0.5)):
            options: dict[str, Any] = {"chat_template": False, "kv_keep": keep, "ignore_eos": True}
            alone = model.generate(text, max_new_tokens=30, **options).token_ids
            assert len(alone) == 30
            pair = model.generate([text, "A longer prompt"], max_new_tokens=30, **options)
            assert pair[0].token_ids == alone
            for n in (1, 2):
                assert model.generate(text, max_new_tokens=n, **options).token_ids == alone[:n]


def test_short_answers_use_few_bytes(elastic: Model) -> None:
    """Allocated: the capacities times an entry's bytes, and nothing beside it."""
    prompt = elastic.prepare(0, "Describe the picture.", [IMAGE], GenerationOptions())
    sizes = []
    for kv_keep in (0.2, 1.0):
        cache = elastic.calls.start([prompt], kv_keep=kv_keep).cache
        entry = 2 * 2 * 32 * 4  # key and value, heads, width, fp32
        buffers = sum(buffer.nbytes for buffer in cache.buffers.values())
        assert cache.bytes_allocated == buffers == int(cache.capacities.sum()) * entry
        assert cache.bytes_used(0) == int(cache.lengths[:, 0].sum()) * entry
        sizes.append(cache.bytes_used(0))
    assert sizes[0] < 0.25 * sizes[1]


def poisoned(folder: Path, graph: str, copy: Path) -> Path:
    """The bundle with one number of layer 2's queries' and keys' weights not finite."""
    shutil.copytree(folder, copy)
    model = onnx.load(copy / f"{graph}.onnx", load_external_data=False)
    (place,) = (
        {e.key: e.value for e in t.external_data}
        for t in model.graph.initializer
        if "layers.2" in t.name and "k_proj" in t.name and t.name.endswith("weight")
    )
    with (copy / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(np.float32("nan").tobytes())
    return copy


@pytest.mark.parametrize("settings", [ELASTIC, INTERVAL], ids=["elastic-cache", "lightvlm"])
def test_importance_that_is_not_finite_is_an_error(
    settings: tuple[str, ...], bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = poisoned(
        bundle("digits-llava", *settings, max_images=2), "prefill", tmp_path / "bundle"
    )
    with (
        lvlm.load(folder, threads=1, verify="none") as model,
        pytest.raises(BackendError, match=r"layer 2, prompt 1: the attention .* is not finite"),
    ):
        model.generate("Describe the picture.", [IMAGE], kv_keep=0.5)


def test_importance_that_becomes_infinite_in_decode_is_an_error(
    bundle: Callable[..., Path],
) -> None:
    """compact.onnx says so too."""
    with lvlm.load(bundle("digits-llava", *INTERVAL, max_images=2), threads=1) as model:
        prompt = model.prepare(0, "Describe the picture.", [IMAGE], GenerationOptions())
        batch = model.calls.start([prompt], kv_keep=0.5)
        for _ in range(15):
            batch.feed([5])
        batch.cache.buffers["query_3"][:] = np.nan
        with pytest.raises(BackendError, match="layer 3, prompt 1"):
            batch.feed([5])
