"""generation_config.json: ends of texts, what is honoured, what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import their_answer, transformers_inputs
from prompt_file_tools import edit, read
from settings import ASSETS
from transformers import AutoModelForImageTextToText
from transformers import GenerationConfig as TheirConfig

import lvlm
from lvlm.core.errors import CheckpointError
from lvlm.export.families.parts.generation_file import REFUSED
from lvlm.runtime.options.generation_options import GenerationOptions


@pytest.mark.parametrize(
    ("generation", "config", "text", "tokenizer", "expected"),
    [
        ([7, 8], 6, 5, "</s>", (7, 8)),
        (..., 6, 5, "</s>", (6,)),
        (..., ..., 5, "</s>", (5,)),
        (..., ..., ..., "</s>", (2,)),
        (..., ..., ..., ..., ()),
    ],
)
@pytest.mark.parametrize("file", [True, False])
def test_end_of_text_ids(
    generation: Any,
    config: Any,
    text: Any,
    tokenizer: Any,
    expected: tuple[int, ...],
    file: bool,
    folder: Path,
) -> None:
    edit(folder / "generation_config.json", eos_token_id=generation)
    if not file:
        (folder / "generation_config.json").unlink()
        expected = expected if generation is ... else (config,)
    raw = json.loads((folder / "config.json").read_text())
    inner = {k: v for k, v in raw["text_config"].items() if k != "eos_token_id"}
    inner |= {} if text is ... else {"eos_token_id": text}
    edit(folder / "config.json", eos_token_id=config, text_config=inner)
    edit(folder / "tokenizer_config.json", eos_token=tokenizer)
    assert read(folder).eos_ids == expected


def test_what_is_honoured(folder: Path) -> None:
    values = {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[5], [6, 7]],
        "min_length": 4,
        "suppress_tokens": [9],
        "begin_suppress_tokens": [8],
        "top_k": 20,
    }
    edit(folder / "generation_config.json", do_sample=True, temperature=0.6, **values)
    sampling = {"do_sample": True, "temperature": 0.6}
    assert read(folder).generation == values | {"sampling": sampling}
    edit(folder / "generation_config.json", top_k=0, max_new_tokens=30)
    sampling |= {"top_k": 0, "max_new_tokens": 30}  # off is not the same as not said
    assert read(folder).generation["sampling"] == sampling
    edit(folder / "generation_config.json", min_new_tokens=2)  # comes before min_length
    assert "min_length" not in read(folder).generation
    (folder / "generation_config.json").unlink()
    assert read(folder).generation == {}


SAID: dict[str, Any] = {
    "constraints": [1],
    "dola_layers": "high",
    "encoder_no_repeat_ngram_size": 2,
    "exponential_decay_length_penalty": [5, 1.1],
    "force_words_ids": [[1]],
    "sequence_bias": [[[5], -10.0]],
    "stop_strings": ["."],
    "token_healing": True,
    "watermarking_config": {"greenlist_ratio": 0.3},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_name(name: str, folder: Path) -> None:
    for idle in (None, *REFUSED[name]):
        edit(folder / "generation_config.json", **{name: idle})
        read(folder)
    edit(folder / "generation_config.json", **{name: SAID.get(name, 3)})
    with pytest.raises(CheckpointError, match=name):
        read(folder)


@pytest.mark.parametrize("values", [{"repetition_penalty": -1.0}, {"bad_words_ids": "x"}])
def test_values_that_mean_nothing(values: dict[str, Any], folder: Path) -> None:
    edit(folder / "generation_config.json", **values)
    with pytest.raises(CheckpointError, match="generation_config") as caught:
        read(folder)
    assert "\n" not in str(caught.value)


ASKED = "USER: <image>\nDescribe the picture. ASSISTANT:"
IMAGE = ASSETS / "samples/digits-1.png"


@pytest.fixture(scope="module")
def theirs() -> Any:
    """digits-llava in transformers."""
    folder = ASSETS / "digits-llava"
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def plain(bundle: Callable[..., Path]) -> list[int]:
    """digits-llava's answer without a generation_config.json that says anything."""
    with lvlm.load(bundle("digits-llava", max_images=2)) as model:
        options = GenerationOptions(chat_template=False, max_new_tokens=24)
        return list(model.generate(ASKED, [IMAGE], options=options).token_ids)


@pytest.mark.parametrize(
    "says",
    [
        lambda _: {"repetition_penalty": 4.0},
        lambda ids: {"bad_words_ids": [ids[1:3], [ids[5]]]},
        lambda ids: {"begin_suppress_tokens": ids[:1]},
        lambda ids: {"suppress_tokens": ids[2:4]},
        lambda _: {"no_repeat_ngram_size": 2},
        lambda ids: {"min_new_tokens": 23, "eos_token_id": ids[6]},
        lambda ids: {"min_length": 200, "eos_token_id": ids[6]},
    ],
    ids=["penalty", "bad words", "begin", "suppress", "n-grams", "min_new_tokens", "min_length"],
)
def test_answers_are_those_of_generate_as_configured(
    says: Callable[[list[int]], dict[str, Any]],
    theirs: Any,
    plain: list[int],
    folder: Path,
    bundle: Callable[..., Path],
    tmp_path: Path,
) -> None:
    edit(folder / "generation_config.json", **says(plain))
    made = read(folder)
    own = shutil.copytree(bundle("digits-llava", max_images=2), tmp_path / "bundle")
    manifest = json.loads((own / "lvlm.json").read_text())
    manifest["generation"] = made.generation
    manifest["text"]["eos_ids"] = list(made.eos_ids)
    (own / "lvlm.json").write_text(json.dumps(manifest))
    theirs.generation_config = TheirConfig.from_pretrained(folder)
    with lvlm.load(own) as model, lvlm.Engine(own, slots=1) as engine:
        options = GenerationOptions(chat_template=False, max_new_tokens=24)
        prompt = model.prepare(0, ASKED, [IMAGE], options)
        given = transformers_inputs(folder, prompt)
        expected = their_answer(theirs, prompt.ids, given, max_new_tokens=24)
        assert expected != plain
        assert model.generate(ASKED, [IMAGE], options=options).token_ids == expected
        assert engine.generate(ASKED, [IMAGE], options=options).token_ids == expected
