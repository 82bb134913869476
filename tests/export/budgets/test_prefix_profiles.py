"""PrefixKV budgets against a brute force and the released code; the profile file and its errors."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from released_search import search_reference
from rows import profile_rows
from safetensors import safe_open
from safetensors.torch import save_file
from settings import ASSETS

from lvlm.core.errors import CheckpointError, ExportError, ParameterError
from lvlm.export.budgets.prefix_profiles import (
    DataId,
    LayerSpread,
    ModelId,
    Profile,
    RecipeId,
    check_profile,
    identify,
    model_hash,
    read_profile,
)
from lvlm.export.budgets.prefix_search import (
    grid,
    mean_rows,
    search,
    search_fractions,
)
from lvlm.export.checkpoint.checkpoint import Checkpoint

VECTORS = sorted((Path(__file__).parents[2] / "data/caches").glob("prefixkv_*.npz"))


def every_threshold(layers: list[list[int]], target: int) -> list[int]:
    """The counts by trying each threshold there is, in exact arithmetic."""
    shares = []
    for scores in layers:
        ordered = sorted(scores, reverse=True)
        shares.append([Fraction(sum(ordered[: i + 1]), sum(ordered)) for i in range(len(scores))])

    def smallest_prefixes(p: Fraction) -> list[int]:
        return [next(i + 1 for i, share in enumerate(s) if share >= p) for s in shares]

    counts = [1] * len(layers)
    for p in sorted({x for s in shares for x in s}):
        wanted = smallest_prefixes(p)
        if sum(wanted) <= target:
            counts = wanted
            continue
        for layer, more in enumerate(wanted):
            counts[layer] += min(more - counts[layer], target - sum(counts))
        return counts
    # What received no attention at all is kept last.
    for layer, scores in enumerate(layers):
        counts[layer] += min(len(scores) - counts[layer], target - sum(counts))
    return counts


SCORES = st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any)


@given(layers=st.lists(SCORES, min_size=1, max_size=5), keep=st.floats(0.01, 1))
def test_search_is_what_trying_every_threshold_gives(layers: list[list[int]], keep: float) -> None:
    """Small whole scores: many ties within and between layers of unequal length."""
    target = max(round(keep * sum(map(len, layers))), len(layers))
    found = search([np.array(x, np.float32) for x in layers], keep)
    assert found.tolist() == every_threshold(layers, target)


def random_layers(rng: np.random.Generator) -> list[np.ndarray]:
    lengths = rng.integers(1, 60, size=int(rng.integers(1, 9)))
    return [rng.pareto(rng.uniform(0.3, 3), size=n) + 1e-12 for n in lengths]


def test_counts_sum_to_the_target_exactly() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        layers = random_layers(rng)
        keep = float(rng.choice([1.0, rng.uniform(1e-3, 1)], p=[0.05, 0.95]))
        counts = search([torch.from_numpy(x) for x in layers], keep)
        total = sum(map(len, layers))
        assert counts.sum() == max(round(keep * total), len(layers))
        assert (counts >= 1).all()
        assert all(n <= len(x) for n, x in zip(counts, layers, strict=True))


def test_a_layer_whose_attention_is_spread_keeps_more() -> None:
    sharp, flat = np.array([100.0] + [0.1] * 19), np.full(20, 1.0)
    assert search([sharp, flat], 0.5).tolist() == [1, 19]
    assert search([flat, sharp, flat], 0.5).tolist() == [15, 1, 14]  # a tie: the lower layer first


def test_fractions_are_of_each_layers_own_length() -> None:
    layers = [np.arange(1.0, 41), np.arange(1.0, 11)]
    for keep, row in zip((0.2, 0.7), search_fractions(layers, (0.2, 0.7)), strict=True):
        assert row.tolist() == (search(layers, keep) / [40, 10]).tolist()


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, math.nan])
def test_keep_out_of_range(keep: float) -> None:
    with pytest.raises(ParameterError, match="give a number above 0 and up to 1"):
        search([np.ones(4)], keep)
    with pytest.raises(ParameterError, match="above 0"):
        grid(keep)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "no layer"),
        ([np.ones(3), np.array([1, np.nan])], "layer 1 are not all finite"),
        ([np.array([1, np.inf])], "layer 0 are not all finite"),
        ([np.array([2.0, -1])], "layer 0 are not all finite and positive"),
        ([np.zeros(3)], "layer 0 are not all finite and positive"),
        ([np.ones((2, 2))], "shape (2, 2)"),
        ([np.ones(0)], "shape (0,)"),
    ],
)
def test_importances_that_cannot_be(layers: list[np.ndarray], message: str) -> None:
    with pytest.raises(ParameterError) as error:
        search(layers, 0.5)
    assert message in str(error.value)


def vector(path: Path) -> tuple[dict[str, Any], list[torch.Tensor], np.ndarray]:
    """meta, importances [1,N] of every layer, evicted fractions [L] as recorded."""
    with np.load(path) as arrays:
        meta = json.loads(str(arrays["meta"]))
        attention = [torch.from_numpy(arrays[f"attn_{i}"]) for i in range(meta["layers"])]
        return meta, [a.mean(1).sum(1) for a in attention], arrays["evicted_fraction_per_layer"]


@pytest.mark.parametrize("path", VECTORS, ids=[p.stem for p in VECTORS])
def test_reference_search_equals_the_released_code(path: Path) -> None:
    meta, importances, recorded = vector(path)
    evicted, sinks = meta["evicted_fraction"], meta["start_size"]
    found = search_reference(importances, evicted, sinks=sinks)
    np.testing.assert_array_equal(found, recorded)
    # Row 0 decides for the whole batch.
    batch = [torch.cat([s, s.flip(1) ** 3]) for s in importances]
    np.testing.assert_array_equal(search_reference(batch, evicted, sinks=sinks), recorded)
    # The paper's search agrees but for what the quirks move.
    kept = search([s[0] for s in importances], 1 - evicted) / meta["prompt"]
    assert 0 < np.abs(kept - (1 - found)).max() < 0.06


def test_there_are_three_vectors() -> None:
    assert len(VECTORS) == 3


def test_reference_search_ends_where_no_threshold_fits() -> None:
    """All attention on one entry: either nearly all is evicted, or, at full share, nothing."""
    one = torch.nn.functional.one_hot(torch.tensor([0]), 100).float()
    assert search_reference([one, one], 0.3).tolist() == [0.3, 0.3]
    assert search_reference([torch.ones(1, 3)], 0.0).tolist() == [0.0]


def test_rows_have_the_asked_mean_exactly() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        layers = int(rng.integers(1, 9))
        samples = [[rng.pareto(0.5, rng.integers(1, 50)) for _ in range(layers)] for _ in range(3)]
        keeps = grid(float(rng.uniform(0.01, 1)))
        for row in profile_rows(samples, keeps):
            assert abs(sum(row.fractions) / layers - row.keep) < 1e-12
            assert all(0 < x <= 1 for x in row.fractions)


def test_rows_are_the_samples_means() -> None:
    """Where lengths are equal the mean over the samples needs next to no correction."""
    rng = np.random.default_rng(2)
    samples = [[rng.pareto(1, 1000) for _ in range(4)] for _ in range(3)]
    (row,) = profile_rows(samples, (0.3,))
    means = np.mean([search(s, 0.3) for s in samples], axis=0) / 1000
    np.testing.assert_allclose(row.fractions, means, rtol=1e-12)
    assert np.ptp(means) > 0.01


def test_what_exceeds_a_layer_goes_to_the_others_in_proportion() -> None:
    (row,) = mean_rows(np.array([[[0.9, 0.4, 0.1]]]), (0.7,))
    assert row.fractions == pytest.approx((1.0, 0.88, 0.22), abs=1e-15)
    (row,) = mean_rows(np.array([[[0.9, 0.8, 0.1]]]), (0.9,))
    assert row.fractions == pytest.approx((1.0, 1.0, 0.7), abs=1e-15)
    (row,) = mean_rows(np.array([[[0.9, 0.8, 0.1]]]), (1.0,))
    assert row.fractions == (1.0, 1.0, 1.0)


def test_grid_rises_and_holds_the_asked_keep_once() -> None:
    assert grid(0.2) == tuple(i / 20 for i in range(1, 20))
    assert grid(0.22)[3:5] == (0.2, 0.22)
    assert grid(0.01)[0] == 0.01
    assert grid(1.0)[-1] == 1.0


def profile(**changes: Any) -> Profile:
    rng = np.random.default_rng(3)
    samples = [[rng.pareto(1, 30) for _ in range(3)] for _ in range(2)]
    found = np.stack([search_fractions(s, grid(0.2)) for s in samples])
    asked = found[:, 3]
    plain = Profile(
        kind="prefixkv",
        schema=1,
        keep=0.2,
        rows=mean_rows(found, grid(0.2)),
        spread=LayerSpread(tuple(asked.std(0).tolist()), tuple(map(tuple, asked.tolist()))),
        layers=3,
        model=ModelId("tiny", "Tiny", "ab" * 32),
        data=DataId("cd" * 32, 2),
        recipe=RecipeId("lightvlm", {"stages": [1, 2], "keep": 0.35, "schedule": None}),
        tools={"torch": "1"},
    )
    return dataclasses.replace(plain, **changes)


def test_profile_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text("old")
    profile().write(path)
    assert read_profile(path) == profile()
    assert read_profile(str(path)).row().keep == 0.2
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]
    with pytest.raises(ExportError, match="cannot be written"):
        profile().write(tmp_path / "missing/p.json")


def edit(*place: str | int, value: Any) -> Any:
    def change(data: Any) -> None:
        for key in place[:-1]:
            data = data[key]
        data[place[-1]] = value

    return change


def drop(key: str) -> Any:
    return lambda data: data.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("keep"), "missing field 'keep'"),
        (edit("extra", value=1), "unknown field 'extra'"),
        (edit("kind", value="svd"), "kind holds 'svd'"),
        (edit("layers", value="3"), "layers holds '3'"),
        (edit("layers", value=4), "other lengths than its 4 layers"),
        (edit("rows", value=[]), "rows for the keeps []"),
        (edit("keep", value=0.22), "made for 0.22"),
        (edit("rows", 0, "keep", value=0.5), "rows for the keeps"),
        (edit("rows", 0, "fractions", 0, value=0.9), "the fractions at keep 0.05 have another"),
        (edit("rows", 0, "fractions", 0, value=math.nan), "out of range"),
        (edit("rows", 0, "fractions", value=[0.05]), "other lengths than its 3 layers"),
        (edit("rows", 18, "fractions", value=[1.05, 0.9, 0.9]), "out of range"),
        (edit("spread", "std", 0, value=-1), "out of range"),
        (edit("spread", "std", value=[0.1]), "other lengths"),
        (edit("spread", "fractions", 1, 2, value=0), "out of range"),
        (edit("data", "samples", value=3), "other samples than its 3"),
        (edit("model", "sha256", value=None), "model.sha256 holds None"),
    ],
)
def test_a_file_that_is_no_profile(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile().write(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ParameterError) as error:
        read_profile(path)
    text = str(error.value)
    assert text.startswith(f"{path} is not a PrefixKV profile (")
    assert text.endswith("); make one with lvlm-calibrate")
    assert message in text
    assert "bundle" not in text


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"7", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_holds_something_else(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(ParameterError, match="is not a PrefixKV profile") as error:
        read_profile(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_profile_that_is_missing_or_of_another_schema(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"none\.json does not exist; make one with lvlm-cal"):
        read_profile(tmp_path / "none.json")
    with pytest.raises(ParameterError, match="is not a PrefixKV profile"):
        read_profile(tmp_path)
    path = tmp_path / "p.json"
    path.write_text('{"schema": 2, "new": true}')
    with pytest.raises(ParameterError, match="has schema 2, this version reads 1"):
        read_profile(path)


def test_a_profile_of_another_model() -> None:
    check_profile(profile(), 3, "ab" * 32)
    with pytest.raises(ParameterError, match="for 3 layers, this model has 32; calibrate"):
        check_profile(profile(), 32, "ab" * 32)
    with pytest.raises(ParameterError, match=r"another checkpoint \(tiny, Tiny\); calibrate"):
        check_profile(profile(), 3, "cd" * 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSETS / "tiny-llava", tmp_path / "model"))


def test_model_hash_is_of_weights_and_configuration(folder: Path) -> None:
    before = model_hash(folder)
    assert before == model_hash(ASSETS / "tiny-llava")
    (folder / "README.md").write_text("hello")
    assert model_hash(folder) == before
    config = folder / "config.json"
    config.write_bytes(config.read_bytes() + b" ")
    assert model_hash(folder) != before


def test_model_hash_sees_a_fine_tuned_tensor(folder: Path) -> None:
    """Same names, types and shapes: the header and the size of the file stay."""
    before = model_hash(folder)
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    size = path.stat().st_size
    save_file(tensors, path, metadata)
    assert model_hash(folder) == before
    (name,) = (n for n in tensors if n.endswith("layers.3.mlp.up_proj.weight"))
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, path, metadata)
    assert path.stat().st_size == size
    assert model_hash(folder) != before


def test_identity_shows_no_path(folder: Path) -> None:
    found = identify(Checkpoint(folder, str(folder), None))
    assert found == ModelId("model", "LlavaForConditionalGeneration", model_hash(folder))
    assert identify(Checkpoint(folder, "owner/name", None)).source == "owner/name"


def test_model_hash_of_a_damaged_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="is no readable safetensors file"):
        model_hash(folder)
    for content in (b"", b"\2" + b"\0" * 7 + b"{}", b"\2" + b"\0" * 7 + b"[]"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"no readable safetensors|without a tensor"):
            model_hash(folder)
