"""Checkpoints that are wrong in one way each: their configuration and other small files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from bundles import FAMILIES
from checkpoint_tools import NAME, change_config, plan
from transformers import AutoTokenizer

from lvlm.core.errors import CheckpointError, LvlmError, ParameterError
from lvlm.export.checkpoint import checkpoint as checkpoints
from lvlm.export.checkpoint.form_discovery import find_forms
from lvlm.export.recipes.uniform import UniformRecipe


def test_an_adapter_beside_a_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter.* give that with --lora"):
        plan(folder)


def test_a_revision_of_what_has_none(folder: Path) -> None:
    for model in (str(folder), "tiny-llava"):
        with pytest.raises(ParameterError, match=r"--revision main.* has no revisions"):
            checkpoints.resolve(model, "main")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "blip"}, "architecture 'blip'"),
        ({"mm_vision_tower": "x"}, "layout of LLaVA's own repository"),
        ({"text_config__model_type": "gemma"}, "text backbone 'gemma'"),
        ({"vision_config__model_type": "dinov2"}, "vision tower 'dinov2'"),
        (
            {"text_config__rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "rope_type 'longrope'",
        ),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy.*cls"),
        ({"quantization_config": {"quant_method": "hqq"}}, r"with hqq \(quantization_config in"),
        ({"quantization_config": "awq"}, r"with None \(quantization_config in"),
        ({"text_config__quantization_config": {"b": 4}}, r"\(text_config\.quantization_config in"),
        ({"compression_config": {"format": "x"}}, r"compressed-tensors, without config_groups"),
        ({"compression_config": {"quant_method": "x"}}, r"\(compression_config in config\.json"),
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
        plan(copy, recipe=UniformRecipe())
    assert plan(copy).skeleton.language.windowed(2048)
    images = plan(copy).images.tokens
    with pytest.raises(ParameterError, match=f"lower --max-text-len to {100 - images} or less"):
        plan(copy, recipe=UniformRecipe(), max_text_len=101 - images)
    whole = plan(copy, recipe=UniformRecipe(), max_text_len=100 - images)
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
        ("config.json", {"vision_feature_layer": 40}),
        ("config.json", {"vision_feature_layer": [-2, -40]}),
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
            assert checkpoints.find_family(config.to_dict(), "") is family


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("field", ["text_config.num_attention_heads", "vision_config.patch_size"])
def test_sizes_that_are_none_are_told_by_name(name: str, field: str) -> None:
    """Whoever says so, transformers' class or we: what they divide is not met."""
    _, config = next(iter(FAMILIES[name].tiny_configs()))
    raw, (part, key) = config.to_dict(), field.split(".")
    assert raw[part][key]
    raw[part][key] = [0, 0] if isinstance(raw[part][key], list | tuple) else 0
    with pytest.raises(CheckpointError, match=rf"{key} .* must be 1 or more|is not valid"):
        FAMILIES[name].read_config(raw)


@pytest.mark.parametrize(
    ("vision", "name"),
    [
        ({"model_type": "pixtral"}, "pixtral"),
        ({"model_type": "siglip_vision_model"}, "llava"),
        ({"model_type": "dinov2"}, "llava"),  # which refuses it by name
        ({}, "llava"),
        (None, "llava"),
        (["pixtral"], "llava"),
    ],
)
def test_a_tower_may_have_a_family_of_its_own(vision: object, name: str) -> None:
    """Of one type of model: it comes first, whatever the families' order."""
    config = {"model_type": "llava", "vision_config": vision}
    assert checkpoints.find_family(config, "").name == name
    with pytest.raises(CheckpointError, match=r"'llama'.* supported: .*llava, .*llava/pixtral"):
        checkpoints.find_family(config | {"model_type": "llama"}, "")


@pytest.mark.parametrize(
    ("source", "more", "twin"),
    [
        ("liuhaotian/llava-v1.5-7b", {}, "llava-hf/llava-1.5-7b-hf"),
        ("/models/llava-v1.5-13b/", {"model_type": "llava"}, "llava-hf/llava-1.5-13b-hf"),
        ("mine", {"_name_or_path": "./x/llava-v1.6-mistral-7b"}, "llava-v1.6-mistral-7b-hf"),
        ("mine", {}, "its twin of llava-hf"),
    ],
)
def test_the_layout_of_llava_s_own_repository(
    source: str, more: dict[str, Any], twin: str, tmp_path: Path
) -> None:
    config = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14"}
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    with pytest.raises(CheckpointError, match=f"take .*{twin}"):
        find_forms(checkpoints.Checkpoint(tmp_path, source, None))


@pytest.mark.parametrize(
    ("source", "twin"),
    [
        ("OpenGVLab/InternVL3-1B", "take OpenGVLab/InternVL3-1B-hf, the same"),
        ("/models/InternVL3_5-8B/", "take OpenGVLab/InternVL3_5-8B-HF, the same"),
        ("OpenGVLab/InternVL2-8B", "take its twin, whose name ends in -hf"),
    ],
)
def test_the_layout_of_internvl_s_own_repositories(source: str, twin: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    with pytest.raises(CheckpointError, match=twin):
        find_forms(checkpoints.Checkpoint(tmp_path, source, None))
