"""A checkpoint's small files: read as transformers reads them, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from prompt_file_tools import SMALL, edit, read
from transformers import AutoProcessor, AutoTokenizer

from lvlm.core.errors import CheckpointError
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.chat_template import ChatTemplate
from lvlm.runtime.prompt.prompts import PromptMaker
from lvlm.runtime.prompt.text import Tokenizer

MESSAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
OWN = (
    "{% for m in messages %}Q {% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}"
    "{% endfor %}"
)


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
    images = read_bundle(bundle("digits-llava", max_images=2), verify="none").images
    maker = PromptMaker(tokenizer, images, 10**6, made.chat_template, made.special_tokens)
    ours = list(maker.prepare(0, "Hi", [], GenerationOptions()).ids)
    assert ours == theirs[0]
    assert ours[:1] == first
    typed = maker.prepare(0, "<s>Hi", [], GenerationOptions(chat_template=False)).ids
    assert list(typed) == processor.tokenizer("<s>Hi")["input_ids"]


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
