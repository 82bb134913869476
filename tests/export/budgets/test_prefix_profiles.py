"""The file of a PrefixKV profile, and what is no such file."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from settings import ASSETS

from lvlm.core.errors import CheckpointError, ExportError, ParameterError
from lvlm.export.budgets.prefix_profiles import (
    DataId,
    LayerSpread,
    ModelId,
    PrefixProfile,
    RecipeId,
    check_profile,
    identify,
    model_hash,
    read_profile,
)
from lvlm.export.budgets.prefix_search import grid, mean_rows, search_fractions
from lvlm.export.checkpoint.checkpoint import Checkpoint


def profile(**changes: Any) -> PrefixProfile:
    rng = np.random.default_rng(3)
    samples = [[rng.pareto(1, 30) for _ in range(3)] for _ in range(2)]
    found = np.stack([search_fractions(s, grid(0.2)) for s in samples])
    asked = found[:, 3]
    plain = PrefixProfile(
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
    return Path(shutil.copytree(ASSETS / "digits-llava", tmp_path / "model"))


def hash_of(folder: Path) -> str:
    return model_hash(Checkpoint(folder, str(folder), None))


def test_model_hash_is_of_weights_and_configuration(folder: Path) -> None:
    before = hash_of(folder)
    assert before == hash_of(ASSETS / "digits-llava")
    (folder / "README.md").write_text("hello")
    assert hash_of(folder) == before
    config = folder / "config.json"
    config.write_bytes(config.read_bytes() + b" ")
    assert hash_of(folder) != before


def test_model_hash_sees_a_fine_tuned_tensor(folder: Path) -> None:
    """Same names, types and shapes: the header and the size of the file stay."""
    before = hash_of(folder)
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    size = path.stat().st_size
    save_file(tensors, path, metadata)
    assert hash_of(folder) == before
    (name,) = (n for n in tensors if n.endswith("layers.3.mlp.up_proj.weight"))
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, path, metadata)
    assert path.stat().st_size == size
    assert hash_of(folder) != before


def test_identity_shows_no_path(folder: Path) -> None:
    found = identify(Checkpoint(folder, str(folder), None))
    assert found == ModelId("model", "LlavaForConditionalGeneration", hash_of(folder))
    assert identify(Checkpoint(folder, "owner/name", None)).source == "owner/name"


def test_model_hash_of_a_damaged_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="is no readable safetensors file"):
        hash_of(folder)
    for content in (b"", b"\2" + b"\0" * 7 + b"{}", b"\2" + b"\0" * 7 + b"[]"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"no readable safetensors|without a tensor"):
            hash_of(folder)
