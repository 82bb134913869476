"""Every parameter takes the tensor that transformers' from_pretrained gives it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import EXPORTED, TINY
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lvlm.core.errors import CheckpointError
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import ExportPlan, make_plan
from lvlm.export.recipes.none import NoCompression

TIED = "llava:qwen2-tied-siglip"
HEAD, EMBED = "lm_head.weight", "language_model.model.embed_tokens.weight"
FIRST = (  # of LLaVA and its kin, as most of the hub's checkpoints have it
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.(multi_modal_projector|image_newline)", r"\1"),
)
FIVE = (  # written by transformers 5.5
    (r"^model\.language_model\.", "model.language_model.model."),
    (r"^model\.vision_tower\.", "model.vision_tower.vision_model."),
)
QWEN = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
INTERN = ((r"^model\.vision_tower\.", "vision_tower."), *FIRST)
BASE = ((r"^model\.", ""),)  # of the model below the head
AGES = [
    *((name, ()) for name in EXPORTED),
    *((name, FIRST) for name in EXPORTED if name.startswith(("llava", "gemma3"))),
    *((name, FIVE) for name in TINY if name.startswith("llava")),
    *((name, QWEN) for name in TINY if name.startswith("qwen2")),
    *((name, INTERN) for name in TINY if name.startswith(("internvl", "mistral3", "pixtral"))),
    *((name, BASE) for name in TINY if name.startswith("smolvlm")),
]


def copy_of(checkpoint: Callable[[str], Path], name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint(name), tmp_path / "checkpoint"))


def rewrite(
    folder: Path, names: Sequence[tuple[str, str]] = (), **change: torch.Tensor | None
) -> None:
    """The weights under other names, and with some replaced or (None) taken out."""
    weights = load_file(folder / "model.safetensors")
    weights |= {k: v for k, v in change.items() if v is not None}
    for name, value in change.items():
        if value is None:
            del weights[name]
    renamed = {}
    for name, value in weights.items():
        new = next((re.sub(a, b, name) for a, b in names if re.search(a, name)), name)
        renamed[new] = value
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def today(folder: Path) -> None:
    """Its weights under the names of the model's parameters."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    weights = dict(model.named_parameters())  # of tied ones the first
    save_file({k: v.detach().clone() for k, v in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


def edit(folder: Path, text: dict[str, Any] | None = None, **values: Any) -> None:
    """config.json with other values; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    config["text_config"] |= text or {}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def plan(folder: Path) -> ExportPlan:
    return make_plan(ExportOptions(str(folder), NoCompression(), folder.parent / "out"))


def check(folder: Path) -> ExportPlan:
    """Compare name by name with from_pretrained; tied parameters, too."""
    made = plan(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    theirs = dict(model.named_parameters(remove_duplicate=False))
    assert set(made.stored_names) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(made.checkpoint.read(made.stored_names[name]).float(), value), name
    first: dict[int, str] = {}
    for name, parameter in made.skeleton.model.named_parameters(remove_duplicate=False):
        assert torch.equal(theirs[first.setdefault(id(parameter), name)], theirs[name]), name
    return made


@pytest.mark.parametrize(("name", "names"), AGES)
def test_names_of_all_ages(
    name: str,
    names: Sequence[tuple[str, str]],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = copy_of(checkpoint, name, tmp_path)
    today(folder)
    rewrite(folder, names)
    check(folder)


def test_stored_apart_stays_apart(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The configuration ties, the files hold two: transformers keeps both."""
    folder = copy_of(checkpoint, TIED, tmp_path)
    rewrite(folder, **{HEAD: torch.randn(640, 64)})
    made = check(folder)
    assert made.stored_names[HEAD] == HEAD
    assert made.config.tie_word_embeddings is False


def test_stored_twice_but_equal_is_tied(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of(checkpoint, TIED, tmp_path)
    rewrite(folder, **{HEAD: load_file(folder / "model.safetensors")[EMBED]})
    assert check(folder).config.tie_word_embeddings


def test_tied_by_the_head_alone(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The embedding is missing: transformers takes the head for it."""
    folder = copy_of(checkpoint, TIED, tmp_path)
    rewrite(folder, ((re.escape(EMBED), HEAD),))
    check(folder)


@pytest.mark.parametrize(
    "name", [TIED, "llava-onevision:qwen2-gqa-tied-siglip", "qwen2-vl:mha-tied"]
)
def test_the_text_config_ties(name: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of(checkpoint, name, tmp_path)
    edit(folder, text={"tie_word_embeddings": True}, tie_word_embeddings=False)
    check(folder)


def test_a_default_that_ties(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """InternVL's class ties where config.json says nothing; a stored head counts for more."""
    folder = copy_of(checkpoint, "internvl:qwen3-mha-rms", tmp_path)
    edit(folder, text={"tie_word_embeddings": False}, tie_word_embeddings=None)
    names = check(folder).stored_names
    assert names[HEAD] != names["model.language_model.embed_tokens.weight"]


def test_a_head_that_is_missing(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of(checkpoint, TIED, tmp_path)
    edit(folder, text={"tie_word_embeddings": False}, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lacks the weight lm_head\.weight"):
        plan(folder)
