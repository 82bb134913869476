"""A checkpoint's weights: older names, files and their index, what is missing or wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import change_config, change_weights, plan
from safetensors.torch import load_file, save_file

from lvlm.core.errors import CheckpointError
from lvlm.core.progress import Progress
from lvlm.export.exporter import export


def test_missing_weight_is_named(folder: Path) -> None:
    gone = "language_model.model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda w: w.__delitem__(gone))
    with pytest.raises(CheckpointError, match=r"lacks the weight .*layers\.1\.mlp\.up_proj"):
        plan(folder)


def test_extra_weight_is_named(folder: Path) -> None:
    change_weights(folder, lambda w: w.update({"adapter.gate": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"has a weight the model lacks: adapter\.gate"):
        plan(folder)


def test_misshapen_weight_is_named_with_both_shapes(folder: Path) -> None:
    change_weights(folder, lambda w: w.update({"language_model.model.norm.weight": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[3\].*\[64\]"):
        plan(folder)


def test_a_tied_head_takes_the_embedding(folder: Path) -> None:
    names = plan(folder).stored_names
    assert names["lm_head.weight"] == names["model.language_model.embed_tokens.weight"]


def test_older_names_and_leftover_tables_are_understood(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """As llava-1.5's hub repository has them."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("llava:llama-gqa-clip"), copy)

    def rename(weights: dict[str, torch.Tensor]) -> None:
        for key in list(weights):
            if key.startswith("vision_tower."):
                old = key.replace("vision_tower.", "vision_tower.vision_model.", 1)
                weights[old] = weights.pop(key)
        weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        weights["vision_tower.vision_model.embeddings.position_ids"] = torch.zeros(1, 17)

    change_weights(copy, rename)
    assert set(plan(copy).stored_names.values()) <= set(load_file(copy / "model.safetensors"))


@pytest.mark.usefixtures("shared_traces")
def test_shards_give_the_same_bundle(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    whole = export(plan(folder, validate=False), Progress(0, quiet=True))
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({k: weights[k] for k in keys}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.rmtree(folder.parent / "out")
    parts = export(plan(folder, validate=False), Progress(0, quiet=True))
    assert parts.manifest.files["weights.bin"] == whole.manifest.files["weights.bin"]
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is listed in .* but missing"):
        plan(folder)


def shards(folder: Path, index: dict[str, Any] | None = None, **parts: Any) -> None:
    """The weights in files of these names, and an index of them."""
    (folder / "model.safetensors").unlink()
    for file, tensors in parts.items():
        save_file(tensors, folder / f"{file}.safetensors")
    known = {k: f"{file}.safetensors" for file, tensors in parts.items() for k in tensors}
    made = {"metadata": {}, "weight_map": known} if index is None else index
    (folder / "model.safetensors.index.json").write_text(json.dumps(made))


def test_a_stale_index_beside_the_whole_file(folder: Path) -> None:
    """transformers reads model.safetensors where there is one."""
    index = {"weight_map": {"lm_head.weight": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in plan(folder).checkpoint.weight_files] == ["model.safetensors"]


def test_an_index_only_lists_files(folder: Path) -> None:
    """Tensors count where they are, as in transformers, not where the index has them."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    first, second = ({k: weights[k] for k in part} for part in (names[::2], names[1::2]))
    swapped = dict.fromkeys(first, "b.safetensors") | dict.fromkeys(second, "a.safetensors")
    del swapped[names[0]]  # nor need it name everything
    shards(folder, {"weight_map": swapped}, a=first, b=second)
    made = plan(folder)
    assert torch.equal(made.checkpoint.read(names[0]), weights[names[0]])


def test_a_tensor_in_two_files_is_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = min(weights)
    shards(folder, a=weights, b={name: weights[name]})
    with pytest.raises(CheckpointError, match=r"embed_tokens.* is in a\.safetensors and in b"):
        plan(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "outside the folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside the folder"),
        ({"weight_map": {"a": 5}}, "has no weight_map of files"),
        ({"weight_map": []}, "has no weight_map of files"),
        ({"weight_map": {"a": "x" * 5000}}, "is listed in .* but missing"),
        ([], "holds no JSON object"),
    ],
)
def test_an_index_that_is_wrong(folder: Path, index: Any, message: str) -> None:
    shards(folder, index)
    with pytest.raises(CheckpointError, match=message):
        plan(folder)


def test_weights_that_the_configuration_names(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "chosen.safetensors")
    change_config(folder, transformers_weights="chosen.safetensors")
    assert [path.name for path in plan(folder).checkpoint.weight_files] == ["chosen.safetensors"]
    change_config(folder, transformers_weights="../chosen.safetensors")
    with pytest.raises(CheckpointError, match="outside the folder"):
        plan(folder)


def test_two_names_for_one_weight(folder: Path) -> None:
    now, before = "model.language_model.norm.weight", "language_model.model.norm.weight"
    change_weights(folder, lambda w: w.update({now: w[before].clone()}))
    with pytest.raises(CheckpointError, match=r"norm\.weight for one weight"):
        plan(folder)


@pytest.mark.parametrize("of_text", [None, "float32"])
def test_the_weights_say_the_dtype_where_the_configuration_does_not(
    folder: Path, of_text: str | None
) -> None:
    """As transformers: the text model's alone is not the model's."""
    change_weights(folder, lambda w: w.update({k: v.bfloat16() for k, v in w.items()}))
    change_config(folder, dtype=None, torch_dtype=None, text_config__dtype=of_text)
    assert plan(folder).dtype == torch.bfloat16
    change_config(folder, torch_dtype="float16")
    assert plan(folder).dtype == torch.float16


def test_weights_of_integers_are_quantized(folder: Path) -> None:
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    change_weights(folder, lambda w: w.update({name: w[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is stored as I8"):
        plan(folder)


def test_weights_as_torch_saves_them(folder: Path) -> None:
    """In one file, in several, and in none that runs code."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    made = plan(folder)
    assert made.checkpoint.words == "torch's own, 1 file"
    assert set(made.checkpoint.tensors) == set(weights)
    assert all(torch.equal(made.checkpoint.read(name), weights[name]) for name in weights)
    names = sorted(weights)
    for file, keys in (("a.bin", names[::2]), ("b.bin", names[1::2])):
        torch.save({key: weights[key] for key in keys}, folder / file)
    index = {"weight_map": {key: "ab"[i % 2] + ".bin" for i, key in enumerate(names)}}
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert plan(folder).stored_names == made.stored_names
    (folder / "a.bin").write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match=r"a\.bin is not read: .* safetensors"):
        plan(folder)


class Runs:
    """Would write a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_file_of_torch_that_runs_code_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for content, message in (
        ({"a": Runs(folder / "ran")}, r"pytorch_model\.bin is not read: torch takes it for"),
        ({"a": 1}, r"holds more than tensors by their names; save the checkpoint in safe"),
    ):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=message) as caught:
            plan(folder)
        assert "\n" not in str(caught.value)
    assert not (folder / "ran").exists()
