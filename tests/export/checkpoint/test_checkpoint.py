"""Checkpoints that are wrong in one way each, and names of older versions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from bundles import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lvlm.core.errors import CheckpointError, LvlmError, ParameterError
from lvlm.core.progress import Progress
from lvlm.export.checkpoint import checkpoint as checkpoints
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.exporter import export
from lvlm.export.recipes.none import NoCompression
from lvlm.export.recipes.recipe import Recipe
from lvlm.export.recipes.uniform import Uniform

NAME = "llava:qwen2-tied-siglip"


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint(NAME), copy)
    return copy


def plan(folder: Path, recipe: Recipe | None = None, **options: Any) -> Any:
    output = folder.parent / "out"
    return make_plan(ExportOptions(str(folder), recipe or NoCompression(), output, **options))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def change_config(folder: Path, name: str = "config.json", /, **values: Any) -> None:
    file = folder / name
    config = json.loads(file.read_text())
    for path, value in values.items():
        where = config
        *parents, last = path.split("__")
        for parent in parents:
            where = where[parent]
        where[last] = value
    file.write_text(json.dumps(config))


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


def test_weights_of_whole_numbers_are_quantized(folder: Path) -> None:
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    change_weights(folder, lambda w: w.update({name: w[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is stored as I8"):
        plan(folder)


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter.* merge it into the weights"):
        plan(folder)


def test_a_revision_of_what_has_none(folder: Path) -> None:
    for model in (str(folder), "tiny-llava"):
        with pytest.raises(ParameterError, match=r"--revision main.* has no revisions"):
            checkpoints.resolve(model, "main")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "blip"}, "architecture 'blip'"),
        ({"text_config__model_type": "gemma"}, "text backbone 'gemma'"),
        ({"vision_config__model_type": "dinov2"}, "vision tower 'dinov2'"),
        (
            {"text_config__rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "rope_type 'longrope'",
        ),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy.*cls"),
        ({"quantization_config": {"quant_method": "awq"}}, r"with awq \(quantization_config in"),
        ({"text_config__quantization_config": {"b": 4}}, r"\(text_config\.quantization_config in"),
        ({"compression_config": {"format": "x"}}, r"\(compression_config in config\.json"),
    ],
)
def test_unsupported_parts_are_refused_by_name(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises(LvlmError, match=message):
        plan(folder)


@pytest.mark.parametrize(
    ("name", "changes", "layers"),
    [
        ("llava:mistral-clip-layers", {"text_config__sliding_window": 100}, "0, 1, 2"),
        (
            NAME,
            {
                "text_config__layer_types": ["full_attention", *["sliding_attention"] * 2],
                "text_config__use_sliding_window": True,
                "text_config__sliding_window": 100,
            },
            "1, 2",
        ),
    ],
)
def test_an_attention_window_bounds_the_length_with_other_recipes_than_none(
    name: str,
    changes: dict[str, Any],
    layers: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    copy = Path(shutil.copytree(checkpoint(name), tmp_path / "checkpoint"))
    change_config(copy, **changes)
    said = rf"recipe uniform cannot .* \(sliding_window 100: layers {layers}\)"
    with pytest.raises(ParameterError, match=said):
        plan(copy, recipe=Uniform())
    assert plan(copy).skeleton.language.windowed(2048)
    images = plan(copy).images.tokens
    with pytest.raises(ParameterError, match=f"lower --max-text-len to {100 - images} or less"):
        plan(copy, recipe=Uniform(), max_text_len=101 - images)
    whole = plan(copy, recipe=Uniform(), max_text_len=100 - images)
    assert not whole.skeleton.language.windowed(2048)  # the windows hide nothing


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", r"has no config\.json"),
        ("model.safetensors", "save the checkpoint in safetensors"),
        ("tokenizer.json", r"has no tokenizer\.json"),
        ("preprocessor_config.json", r"has no preprocessor_config\.json"),
    ],
)
def test_missing_files_are_named(folder: Path, file: str, message: str) -> None:
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=message):
        plan(folder)


def older_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt for tokenizer.json, as the first Qwen2-VL checkpoints have it."""
    made = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(made["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in made["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["backend"]
    config["tokenizer_class"] = "Qwen2Tokenizer"
    config["added_tokens_decoder"] = {
        str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in made["added_tokens"]
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_vocab_and_merges_become_a_tokenizer(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(checkpoint("qwen2-vl:mha-tied"), tmp_path / "checkpoint"))
    older_tokenizer(copy)
    made = plan(copy)
    ours = tokenizers.Tokenizer.from_str(made.prompt.tokenizer)
    text = "A <image> of 5 things"
    theirs = AutoTokenizer.from_pretrained(copy)(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text, add_special_tokens=False).ids == theirs
    assert made.images.token == "<image>"


def test_what_transformers_cannot_convert_is_told_how(folder: Path) -> None:
    older_tokenizer(folder)  # of a LLaVA, where transformers takes a tokenizer.json only
    with pytest.raises(CheckpointError, match=r"Qwen2Tokenizer\.from_pretrained\(FOLDER\)\.save"):
        plan(folder)


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("config.json", {"vision_config": [1]}),
        ("config.json", {"text_config": "llama"}),
        ("config.json", {"model_type": ["llava"]}),
        ("config.json", {"image_token_index": "x", "image_token_id": "x"}),
        ("config.json", {"text_config__hidden_size": -64}),
        ("config.json", {"text_config__hidden_size": 10**30}),
        ("config.json", {"text_config__num_attention_heads": 0}),
        ("config.json", {"text_config__num_hidden_layers": 10**9}),
        ("config.json", {"text_config__rope_parameters": 5}),
        ("config.json", {"text_config__rope_parameters": {"rope_theta": "x"}}),
        ("config.json", {"vision_config__patch_size": 0}),
        ("config.json", {"vision_config__image_size": 10**6, "vision_config__patch_size": 1}),
        ("config.json", {"vision_feature_layer": "last"}),
        ("config.json", {"dtype": "auto"}),
        ("preprocessor_config.json", {"size": "big"}),
        ("preprocessor_config.json", {"size": {"height": -1, "width": 1}}),
        ("preprocessor_config.json", {"image_mean": {"a": None}}),
    ],
)
def test_words_and_numbers_that_describe_no_model(
    folder: Path, file: str, value: dict[str, Any]
) -> None:
    """One line each, and at once."""
    change_config(folder, file, **value)
    with pytest.raises(LvlmError) as caught:
        plan(folder)
    message = str(caught.value).replace(str(folder), "")
    assert "\n" not in message
    assert 20 < len(message) < 500


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b'{"a": ' * 100_000, b"", b"null"]
)
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_files_that_hold_no_json(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")) as caught:
        plan(folder)
    assert len(str(caught.value).replace(str(folder), "")) < 300


def test_damaged_files_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a header at all")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no readable safetensors"):
        plan(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        plan(folder)


def test_names_that_mean_nothing() -> None:
    with pytest.raises(ParameterError, match="did you mean llava"):
        checkpoints.resolve("lava")
    with pytest.raises(CheckpointError, match="no folder"):
        checkpoints.resolve("./nowhere")
    for model in ("x" * 100_000, "x/" * 1000, "\0", ""):
        with pytest.raises(LvlmError) as caught:
            checkpoints.resolve(model)
        assert len(str(caught.value)) < 500


def test_every_family_has_tiny_configs_that_its_own_check_accepts() -> None:
    for family in FAMILIES.values():
        configs = dict(family.tiny_configs())
        assert configs
        for config in configs.values():
            family.read_config(config.to_dict())
