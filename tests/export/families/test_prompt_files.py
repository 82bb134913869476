"""A checkpoint's small files: read as transformers reads them, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bundles import transformers_inputs
from settings import ASSETS
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers import GenerationConfig as TheirConfig

import lvlm
from lvlm.core.errors import CheckpointError
from lvlm.export.families.family import PromptFiles
from lvlm.export.families.parts.generation_file import REFUSED
from lvlm.export.families.parts.side_files import prompt_files
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.chat_template import ChatTemplate
from lvlm.runtime.prompt.prompts import PromptMaker
from lvlm.runtime.prompt.text import Tokenizer

SMALL = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"),
    *("generation_config.json", "processor_config.json"),
)
MESSAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
OWN = (
    "{% for m in messages %}Q {% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}"
    "{% endfor %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """tiny-llava's files without its weights, to be changed."""
    made = tmp_path / "checkpoint"
    made.mkdir()
    for name in SMALL:
        shutil.copyfile(ASSETS / "tiny-llava" / name, made / name)
    return made


def read(folder: Path) -> PromptFiles:
    return prompt_files(folder, SimpleNamespace())


def edit(path: Path, **values: Any) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    data |= values
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def in_tokenizer_config(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template=OWN)


def as_a_named_list(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": OWN}]
    edit(folder / "tokenizer_config.json", chat_template=named)


def in_processor_config(folder: Path) -> None:
    edit(folder / "processor_config.json", chat_template=OWN)


def in_the_older_file(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": OWN}))


def in_a_file(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template="not this one")
    (folder / "chat_template.jinja").write_text(OWN)


def beside_additional_ones(folder: Path) -> None:
    in_a_file(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("nor this")


PLACES = [
    in_tokenizer_config,
    as_a_named_list,
    in_processor_config,
    in_the_older_file,
    in_a_file,
    beside_additional_ones,
]


@pytest.mark.parametrize("put", PLACES)
def test_chat_templates_are_found_where_transformers_finds_them(
    put: Callable[[Path], None], folder: Path
) -> None:
    (folder / "chat_template.jinja").unlink()
    put(folder)
    processor = AutoProcessor.from_pretrained(folder)
    asked = processor if processor.chat_template else processor.tokenizer
    theirs = asked.apply_chat_template(MESSAGE, tokenize=False)
    made = read(folder)
    assert made.chat_template == OWN
    assert ChatTemplate(OWN, made.special_tokens, "<image>").render("Hi", 1) == theirs


def test_several_templates_without_a_default(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "chat", "template": "x"}, {"name": "tools", "template": "y"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    with pytest.raises(CheckpointError, match="named chat, tools, none of them default"):
        read(folder)


def test_named_special_tokens_are_the_templates_variables(folder: Path) -> None:
    made = read(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert made.special_tokens == tokenizer.special_tokens_map
    template = "{{ bos_token }}{{ image_token }}{{ messages[0].content[-1].text }}"
    ours = ChatTemplate(template, made.special_tokens, "<image>").render("Hi", 1)
    theirs = tokenizer.apply_chat_template(MESSAGE, chat_template=template, tokenize=False)
    assert ours == theirs == "<s><image>Hi"


def test_special_tokens_of_the_older_file(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", bos_token=..., eos_token=...)
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    made = read(folder)
    assert made.special_tokens["bos_token"] == "<s>"
    assert made.special_tokens["eos_token"] == "</s>"
    assert made.special_tokens == AutoTokenizer.from_pretrained(folder).special_tokens_map


def test_tokens_that_only_tokenizer_config_lists(folder: Path) -> None:
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    token = {"content": "<extra>", "special": True, "normalized": False}
    token |= {"lstrip": False, "rstrip": False, "single_word": False}
    edit(folder / "tokenizer_config.json", added_tokens_decoder={str(size): token})
    text = "a <extra> b <image>"
    ours = Tokenizer.of_text(read(folder).tokenizer, [])
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.token_id("<extra>") == size
    assert ours.decode(ours.encode(text)) == theirs.decode(
        theirs(text)["input_ids"], skip_special_tokens=True
    )


@pytest.mark.parametrize(
    ("start", "first"),
    [("{{ bos_token }}", [1]), ("", [1]), ("\n{{ bos_token }}", [1])],
    ids=["bos", "none", "newline, then bos"],
)
def test_a_template_that_writes_the_beginning_token(
    start: str, first: list[int], folder: Path, bundle: Callable[..., Path]
) -> None:
    """The tokenizer adds one, too, unless the text begins with it; a user may type one."""
    path = folder / "chat_template.jinja"
    path.write_text(start + path.read_text())
    processor = AutoProcessor.from_pretrained(folder)
    message = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    theirs = processor.apply_chat_template(message, tokenize=True, add_generation_prompt=True)
    made = read(folder)
    tokenizer = Tokenizer.of_text(made.tokenizer, made.eos_ids)
    images = read_bundle(bundle("tiny-llava", max_images=2), verify="none").images
    maker = PromptMaker(tokenizer, images, 10**6, made.chat_template, made.special_tokens)
    ours = list(maker.prepare(0, "Hi", [], GenerationOptions()).ids)
    assert ours == theirs[0]
    assert ours[:1] == first
    typed = maker.prepare(0, "<s>Hi", [], GenerationOptions(chat_template=False)).ids
    assert list(typed) == processor.tokenizer("<s>Hi")["input_ids"]


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


@pytest.mark.parametrize("content", [b"\xff\xfe{", b'{"a":' * 100_000, b"[]", b"{"])
@pytest.mark.parametrize(
    "name", [n for n in SMALL if n != "chat_template.jinja"] + ["special_tokens_map.json"]
)
def test_files_that_cannot_be_read(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.removesuffix(".json")) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_no_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError):
        read(folder)
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=7)
    with pytest.raises(CheckpointError):
        read(folder)


ASKED = "USER: <image>\nDescribe the picture. ASSISTANT:"
IMAGE = ASSETS / "samples/digits-1.png"


@pytest.fixture(scope="module")
def theirs() -> Any:
    """tiny-llava in transformers."""
    folder = ASSETS / "tiny-llava"
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def plain(bundle: Callable[..., Path]) -> list[int]:
    """tiny-llava's answer without a generation_config.json that says anything."""
    with lvlm.load(bundle("tiny-llava", max_images=2)) as model:
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
    own = shutil.copytree(bundle("tiny-llava", max_images=2), tmp_path / "bundle")
    manifest = json.loads((own / "lvlm.json").read_text())
    manifest["generation"] = made.generation
    manifest["text"]["eos_ids"] = list(made.eos_ids)
    (own / "lvlm.json").write_text(json.dumps(manifest))
    theirs.generation_config = TheirConfig.from_pretrained(folder)
    with lvlm.load(own) as model, lvlm.Engine(own, slots=1) as engine:
        options = GenerationOptions(chat_template=False, max_new_tokens=24)
        prompt = model.prepare(0, ASKED, [IMAGE], options)
        ids = torch.tensor([list(prompt.ids)])
        with torch.no_grad():
            out = theirs.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **transformers_inputs(folder, prompt),
                max_new_tokens=24,
                do_sample=False,
            )
        expected = out[0, ids.shape[1] :].tolist()
        assert expected != plain
        assert model.generate(ASKED, [IMAGE], options=options).token_ids == expected
        assert engine.generate(ASKED, [IMAGE], options=options).token_ids == expected
