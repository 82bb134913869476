"""lvlm-compare as a user runs it: the part without a GPU."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from settings import ASSETS, LIGHTVLM, SMALL

from lvlm.core.errors import ParameterError
from lvlm.export.compare import compare_cli, with_checkpoint
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.policies.shares import Profile, ProfileRow

DATA = Path(__file__).parents[2] / "data/bundles"


@pytest.fixture(scope="module")
def lowered(bundle: Callable[..., Path]) -> Path:
    return bundle(SMALL, *LIGHTVLM, targets=("trt-rtx",), max_images=2)


def test_lowered_graphs_agree(lowered: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ("--against", "onnxruntime", "--graph", "prefill")
    status = compare_cli.main(["layers", str(lowered), *asked])
    said = capfd.readouterr()
    assert status == 0, said.err
    assert "✓ prefill: " in said.out
    for op in ("CausalAttention", "CacheImportance", "CacheCompact", "TokenImportance"):
        assert f"✓   {op} that gives" in said.out
    assert "✗" not in said.out


def test_a_difference_is_found(
    lowered: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(lowered, tmp_path / "changed")
    file = folder / "vision.trt-rtx.onnx"
    model = onnx.load(file, load_external_data=False)
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(a for a in norm.attribute if a.name == "epsilon").f = 0.5
    onnx.save(model, file)
    asked = ("--against", "onnxruntime", "--graph", "vision", "--verify", "none")
    status = compare_cli.main(["layers", str(folder), *asked])
    said = capfd.readouterr()
    assert status == 1, said.err
    assert "✗ vision: " in said.out


def test_graphs_that_were_not_lowered(
    bundle: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = bundle("digits-llava", *LIGHTVLM, max_images=2)
    assert compare_cli.main(["layers", str(folder), "--against", "tensorrt"]) == 2
    said = capfd.readouterr().err
    assert "lvlm-build engine" in said
    assert "Traceback" not in said


def test_answers_of_two_devices(
    bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = bundle("digits-llava", max_images=2), tmp_path / "tokens.json"
    assert compare_cli.main(["devices", str(folder), "--write", str(file)]) == 0
    assert compare_cli.main(["devices", str(folder), "--expect", str(file)]) == 0
    assert "6 of 6 answers equal" in capsys.readouterr().out
    tokens = json.loads(file.read_text())
    tokens[folder.name][1][3] += 1
    file.write_text(json.dumps(tokens))
    assert compare_cli.main(["devices", str(folder), "--expect", str(file)]) == 1
    assert "5 of 6 answers equal" in capsys.readouterr().out
    file.write_text(json.dumps({"other": []}))
    assert compare_cli.main(["devices", str(folder), "--expect", str(file)]) == 2
    assert "make them with --write" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["schema-3", "schema-4-interval"])
def test_an_old_bundle_keeps_the_cache_it_was_exported_with(name: str, tmp_path: Path) -> None:
    """Whatever a recipe's defaults are now."""
    with zipfile.ZipFile(DATA / f"{name}.zip") as archive:
        archive.extractall(tmp_path)
    (folder,) = tmp_path.iterdir()
    manifest = read_bundle(folder, "none")
    assert manifest.cache_policy is not None
    assert manifest.cache_policy.budget.keep == 0.5
    recipe = with_checkpoint.recorded(manifest).for_layers(manifest.text.layers)
    assert recipe.cache_policy() == manifest.cache_policy


def test_a_bundle_with_a_profile_is_not_compared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The profile is not in the recipe that is recorded."""
    with zipfile.ZipFile(DATA / "schema-3.zip") as archive:
        archive.extractall(tmp_path)
    (folder,) = tmp_path.iterdir()
    manifest = read_bundle(folder, "none")
    assert manifest.cache_policy is not None
    row = ProfileRow(0.5, (0.5,) * manifest.text.layers)
    policy = dataclasses.replace(manifest.cache_policy, budget=Profile(0.5, None, (row,)))
    given = dataclasses.replace(manifest, cache_policy=policy)
    monkeypatch.setattr(with_checkpoint, "read_bundle", lambda *_: given)
    with pytest.raises(ParameterError, match="compared by lvlm-export alone"):
        with_checkpoint.compare(folder, "nothing")


def test_a_finished_bundle_is_planned_as_its_export_was(
    bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundle("digits-llava", *LIGHTVLM, max_images=2)
    seen: list[Any] = []

    def validate(plan: Any, *_: Any) -> None:
        seen.append(plan)
        raise ParameterError("seen")

    monkeypatch.setattr(with_checkpoint.validation, "validate", validate)
    with pytest.raises(ParameterError, match="seen"):
        with_checkpoint.compare(folder, str(ASSETS / "digits-llava"))
    manifest, (plan,) = read_bundle(folder), seen
    assert plan.recipe.name == manifest.recipe
    planned = json.loads(json.dumps(dataclasses.asdict(plan.recipe)))
    assert {name: planned[name] for name in manifest.parameters} == manifest.parameters
    assert str(plan.dtype) == f"torch.{manifest.dtype}"
