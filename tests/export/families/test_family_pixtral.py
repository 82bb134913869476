"""Pixtral and Mistral 3: images at their own size, and what an export refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import FAMILIES, TINY
from parity_tools import load_torch
from transformers import AutoTokenizer
from transformers.integrations.mistral import tokenizer as mistral_tokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from lvlm.core.errors import CheckpointError, ParameterError
from lvlm.export.budgets.sample_prompts import prompt_maker
from lvlm.export.checkpoint.checkpoint import Checkpoint, find_family
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.families.parts.llama_text import tiny_token
from lvlm.export.families.parts.side_files import load_tokenizer
from lvlm.export.recipes.none import NoCompression
from lvlm.export.verify.judge import Judge
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.processors.pixtral import max_tokens, normalise_config

NAMES = [name for name in TINY if name.startswith(("mistral3:", "pixtral:"))]
SHAPES = [(40, 40), (20, 300), (250, 31), (1, 1), (90, 60), (600, 500)]


@pytest.mark.parametrize("name", NAMES)
def test_features_equal_transformers(name: str, checkpoint: Callable[[str], Path]) -> None:
    """Of images of many shapes, which transformers pads and keeps apart by a mask."""
    (family, config), folder = TINY[name], checkpoint(name)
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in SHAPES]
    maker = prompt_maker(Checkpoint(folder, "", None), family, config)
    options = GenerationOptions(chat_template=False)
    prompt = maker.prepare(0, "Describe" + "<image>" * len(images), images, options)
    given, theirs = family.transformers_inputs(prompt), load_torch(folder)
    assert given["pixel_values"].shape[0] == len(SHAPES) == len({*map(tuple, given["image_sizes"])})
    vision = family.vision(theirs, config)
    with torch.no_grad():
        expected = theirs.get_image_features(**given).pooler_output
        for image, features in zip(prompt.images, expected, strict=True):
            arrays = {
                port.name: image.arrays[port.name] for port in family.vision_inputs(maker.images)
            }
            ours = vision(**{key: torch.from_numpy(array) for key, array in arrays.items()})
            assert ours.shape == (image.tokens, config.text_config.hidden_size)
            torch.testing.assert_close(ours, features, atol=1e-4, rtol=1e-4)


def plan(folder: Path, tokens: int | None = None, **options: Any) -> Any:
    output = folder.parent / "out"
    given = ExportOptions(str(folder), NoCompression(), output, max_image_tokens=tokens, **options)
    return make_plan(given)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[2]])
def test_fewer_tokens_an_image(name: str, checkpoint: Callable[[str], Path]) -> None:
    whole, bounded, loose = (plan(checkpoint(name), tokens).images for tokens in (None, 20, 99))
    assert whole == loose
    assert whole.tokens == whole.max_dims["units"] == whole.processor["max_tokens"] == 36
    assert bounded.tokens == bounded.max_dims["units"] == bounded.processor["max_tokens"] == 20
    each = whole.processor["merge"] ** 2  # patches of a token; the tower's logits are planned for
    heads = TINY[name][1].vision_config.num_attention_heads
    assert (whole.patches, whole.patch_heads) == (36 * each, heads)
    assert (bounded.patches, bounded.patch_heads) == (20 * each, heads)


def folder_of(name: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint(name), tmp_path / "checkpoint"))


def edit(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


HUB: dict[str, dict[str, Any]] = {
    "pixtral": {
        "model_type": "llava",
        "text_config": {"model_type": "mistral", "hidden_size": 5120, "head_dim": 128},
        "vision_config": {"model_type": "pixtral", "patch_size": 16, "rope_theta": 10000.0},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "mistral3": {
        "model_type": "mistral3",
        "text_config": {"model_type": "mistral", "hidden_size": 5120, "head_dim": 128},
        "vision_config": {"model_type": "pixtral", "patch_size": 14, "rope_theta": 10000.0},
        "spatial_merge_size": 2,
    },
}


@pytest.mark.parametrize(
    ("name", "longest", "tokens"), [("pixtral", 1024, 4096), ("mistral3", 1540, 3025)]
)
def test_the_hub_s_configs_are_read(name: str, longest: int, tokens: int) -> None:
    """As they are there, with rotary parameters as of old; the tokens that an image has at most."""
    raw = HUB[name]
    raw["text_config"] |= {"rope_theta": 1e9, "sliding_window": None, "num_hidden_layers": 40}
    family = find_family(raw, "")
    config = family.read_config(raw)
    assert (family.name, config.text_config.head_dim) == (name, 128)
    assert config.text_config.rope_parameters["rope_theta"] == 1e9
    patch = config.vision_config.patch_size
    size = {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": longest}}
    found = normalise_config(size, patch, getattr(config, "spatial_merge_size", 1), "", "", "")
    assert max_tokens(found) == tokens


def test_the_fast_tokenizer_is_taken_beside_mistral_common(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which transformers prefers where it is installed and the folder has a tekken.json."""
    monkeypatch.setitem(TOKENIZER_MAPPING_NAMES, "mistral3", "MistralCommonBackend")
    monkeypatch.setattr(mistral_tokenizer, "resolve_mistral_format", lambda *_, **__: (True, None))
    folder = checkpoint(NAMES[0])
    with pytest.raises(NameError, match="ValidationMode"):  # of mistral-common, which is not there
        AutoTokenizer.from_pretrained(folder)
    for tokenizer in (load_tokenizer(folder), Judge(folder).tokenizer):
        assert tokenizer.convert_tokens_to_ids("[IMG_END]") == tiny_token(1)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("mistral3", {"text_config": {"model_type": "ministral3"}}, "text backbone 'ministral3'"),
        ("mistral3", {"vision_config": {"model_type": "clip_vision_model"}}, "vision tower"),
        ("mistral3", {"vision_feature_layer": [-1, -2]}, "as wide as one layer's"),
        ("mistral3", {"vision_feature_layer": 3}, "layer 3 is not there: .* has 2 layers"),
        ("pixtral", {"vision_feature_layer": [-1, -4]}, "layer -4 is not there"),
        ("mistral3", {"vision_config": {"patch_size": [14, 14]}}, "patch_size"),
        ("mistral3", {"vision_config": {"num_channels": 1}}, "num_channels '1'"),
        ("mistral3", {"text_config": {"rope_scaling": {"type": "longrope"}}}, "rope_type"),
        ("mistral3", {"quantization_config": {"bits": 4}}, "quantized"),
        ("pixtral", {"vision_feature_select_strategy": "default"}, "select_strategy 'default'"),
        ("pixtral", {"text_config": {"model_type": "llama"}}, "text backbone 'llama'"),
        ("pixtral", {"text_config": {}}, "text backbone 'llama'"),  # transformers' default
        ("pixtral", {"vision_config": {}}, "vision tower 'clip_vision_model'"),
    ],
)
def test_what_is_not_supported_is_named(name: str, change: dict[str, Any], problem: str) -> None:
    raw = next(config for family, config in TINY.values() if family.name == name).to_dict()
    for part, value in change.items():
        known = raw.get(part)
        if isinstance(known, dict) and value:
            value = {k: v for k, v in known.items() if k != "rope_parameters"} | value
        raw[part] = value
    with pytest.raises(CheckpointError, match=problem):
        FAMILIES[name].read_config(raw)


@pytest.mark.parametrize(
    ("name", "file", "values", "problem"),
    [
        (NAMES[0], "processor_config.json", {"spatial_merge_size": 1}, r"\(8, 1\), config.json"),
        (NAMES[0], "processor_config.json", {"patch_size": None}, r"\(16, 2\), config.json"),
        (NAMES[2], "processor_config.json", {"processor_class": "LlavaProcessor"}, "processor 'L"),
        (NAMES[2], "processor_config.json", {"image_token": "[IMG]"}, r"image_token .*'\[IMG\]'"),
        (
            NAMES[2],
            "processor_config.json",
            {"processor_class": None},
            "processor 'LlavaProcessor'",
        ),
        (
            NAMES[0],
            "preprocessor_config.json",
            {"image_processor_type": "CLIPImageProcessor"},
            "supported are PixtralImageProcessor",
        ),
    ],
)
def test_another_processor_is_refused(
    name: str,
    file: str,
    values: dict[str, Any],
    problem: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = folder_of(name, checkpoint, tmp_path)
    edit(folder / file, **values)
    with pytest.raises((CheckpointError, ParameterError), match=problem):
        plan(folder)


def test_a_folder_without_its_processor_s_file(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """As of checkpoints in Mistral's own form alone."""
    folder = folder_of(NAMES[0], checkpoint, tmp_path)
    (folder / "processor_config.json").unlink()
    edit(folder / "tokenizer_config.json", processor_class=None)
    with pytest.raises(CheckpointError, match=r"has no processor_config.json, .*\(8, 2\)"):
        plan(folder)


def test_the_class_of_the_processor_may_stand_elsewhere(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """As transformers' AutoProcessor looks for it; other tokens than the usual are taken."""
    folder = folder_of(NAMES[2], checkpoint, tmp_path)
    edit(folder / "processor_config.json", processor_class=None, image_break_token="<br>")
    edit(folder / "preprocessor_config.json", processor_class="PixtralProcessor")
    assert plan(folder).images.processor["row_end"] == "<br>"
    (folder / "processor_config.json").unlink()  # all is as the class has it, its image token, too
    with pytest.raises(CheckpointError, match=r"image_token .*'\[IMG\]' .*'<image>'"):
        plan(folder)
