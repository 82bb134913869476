"""Gemma 3: what is refused; prompts as its processor writes them, newlines joined; prompts in
pieces, and what follows an image that was read before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import FAMILIES
from example_counts import whole
from parity_tools import IMAGES, ROWS
from transformers import AutoProcessor

import lvlm
from lvlm.core.errors import CheckpointError, ParameterError, PromptError
from lvlm.export.budgets.sample_prompts import prompt_maker
from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.recipes.recipe import known_recipe, parse_settings
from lvlm.runtime.engine import Engine
from lvlm.runtime.generate.asks import one_ask
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.prompts import PromptMaker

FAMILY = FAMILIES["gemma3"]
NARROW, WIDE = "gemma3:gqa-window", "gemma3:wide-window"
# As Gemma's own writes turns; three newlines meet before an image
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def maker_of(folder: Path) -> PromptMaker:
    source = Checkpoint(folder, str(folder), None)
    return prompt_maker(source, FAMILY, FAMILY.read_config(source.config))


@pytest.fixture
def joining(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer makes one token of two newlines, and of three."""
    folder = Path(shutil.copytree(checkpoint(NARROW), tmp_path / "joining"))
    data = json.loads((folder / "tokenizer.json").read_text())
    words = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    words[-2:] = ["ĊĊ", "ĊĊĊ"]  # in place of the last two merges' words
    data["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    data["model"]["merges"][-2:] = [["Ċ", "Ċ"], ["ĊĊ", "Ċ"]]
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\d| ?\p{L}+|\s+|[^\s\p{L}\d]"
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_prompts_are_those_of_their_processor(joining: Path) -> None:
    """What an image's text begins and ends with is one token with the newlines beside it."""
    theirs, maker = AutoProcessor.from_pretrained(joining), maker_of(joining)
    (joined,) = maker.tokenizer.encode("\n\n\n", add_special_tokens=False)
    for asked in (["<image>", "What is it?"], ["Is\n", "<image>", "\nthis", "<image>"], ["Why?"]):
        images = iter(IMAGES)
        parts: list[Any] = [
            {"type": "image", "image": next(images)}
            if part == "<image>"
            else {"type": "text", "text": part}
            for part in asked
        ]
        ask = one_ask([{"role": "user", "content": parts}])
        prompt = maker.prepare(0, ask.prompt, ask.images, GenerationOptions())
        written = theirs.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        given = theirs(
            images=list(ask.images) or None,
            text=written,
            add_special_tokens=False,
            return_tensors="np",
        )
        assert list(prompt.ids) == given["input_ids"][0].tolist()
        mine = FAMILY.transformers_inputs(prompt)
        assert [name for name in mine if not np.array_equal(mine[name], given[name])] == []
        sizes = np.unique(prompt.image_id, return_counts=True)[1].tolist()
        assert sizes[1:] == [16] * asked.count("<image>")
        assert (joined in prompt.ids) == (asked[0] == "<image>")  # behind the newline of the turn


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("two <image> <image>", "the prompt has 2 image placeholders for 1 image; "),
        ("none", "the prompt has 0 image placeholders for 1 image; "),
        (
            "<image> and <image_soft_token>",
            "has 17 image tokens, its images have 16; write <image>",
        ),
    ],
)
def test_placeholders(prompt: str, said: str, checkpoint: Callable[[str], Path]) -> None:
    maker = maker_of(checkpoint(NARROW))
    with pytest.raises(PromptError, match=said):
        maker.prepare(0, prompt, IMAGES[:1], GenerationOptions(chat_template=False))


def test_prompts_in_pieces(bundle: Callable[..., Path]) -> None:
    """Chunks of any length give the answers of a prompt that is read as a whole, though an image is
    longer than the window, and a chunk shorter than both; the next question about an image goes on
    behind it."""
    folder = bundle(NARROW, max_images=2)
    texts, images = [r[0] for r in ROWS], [r[1] for r in ROWS]
    options: dict[str, Any] = {"max_new_tokens": 12, "chat_template": False}
    again = ("USER: <image>\nDescribe the picture. Or not? ASSISTANT:", IMAGES[:1])
    with lvlm.load(folder) as model:
        expected = [g.token_ids for g in model.generate(texts, images, **options)]
        followed = model.generate(*again, **options).token_ids
    for chunk in (1, 7, 20):
        with Engine(folder, slots=4, chunk_tokens=chunk) as engine:
            pairs = zip(texts, images, strict=True)
            handles = [engine.submit(text, images=own, **options) for text, own in pairs]
            assert [handle.result().token_ids for handle in handles] == expected
            answer = engine.generate(*again, **options)
            assert answer.token_ids == followed
            assert answer.stats.reused_tokens > 16  # all of the image


@pytest.mark.skipif(not whole(), reason="exports one more bundle: --whole")
def test_a_turn_with_an_image_is_read_as_a_whole(bundle: Callable[..., Path]) -> None:
    """Behind a compressed cache it would be read as decode reads, token by token."""
    folder = bundle(WIDE, "snapkv", "window=8", max_images=2, sessions=True)
    reused, talk = [], list[dict[str, Any]]()
    with Engine(folder, slots=2) as engine, engine.session() as session:
        for image in (IMAGES[0], None, IMAGES[1], None):
            shown = [] if image is None else [{"type": "image", "image": image}]
            content = [*shown, {"type": "text", "text": "What is it?"}]
            talk.append({"role": "user", "content": content})
            answer = engine.generate(talk, session=session, max_new_tokens=1)
            reused.append(answer.stats.reused_tokens > 0)
            if image is not None:
                assert answer.token_ids == engine.generate(talk, max_new_tokens=1).token_ids
            talk.append({"role": "assistant", "content": answer.text})
    assert reused == [False, True, False, True]


def plan(folder: Path, name: str, *settings: str, **options: Any) -> Any:
    recipe = parse_settings(known_recipe(name), settings)
    return make_plan(ExportOptions(str(folder), recipe, folder.parent / "out", **options))


def test_recipes_and_windows(checkpoint: Callable[[str], Path]) -> None:
    """Where a window hides something nothing may move; where none does, all recipes but those that
    rank by a prompt's queries when its images are read."""
    narrow, wide = checkpoint(NARROW), checkpoint(WIDE)
    with pytest.raises(
        ParameterError,
        match=r"snapkv cannot do layers with a window .*0, 2\); take recipe none, or divprune ",
    ):
        plan(narrow, "snapkv")
    plan(narrow, "divprune")
    plan(wide, "snapkv")
    plan(wide, "lightvlm")
    with pytest.raises(ParameterError, match=r"compact after as many steps .* \(32\) or more"):
        plan(wide, "lightvlm", "kv_interval=31")
    with pytest.raises(ParameterError, match="is not read out of gemma3's; take divprune"):
        plan(wide, "visionzip")
    with pytest.raises(ParameterError, match="every image gives 64 tokens"):
        plan(wide, "none", max_image_tokens=63)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"text_config": {"model_type": "gemma2"}}, "text backbone 'gemma2'"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "vision tower"),
        ({"text_config": {"rope_scaling": {"rope_type": "longrope"}}}, "rope_type 'longrope'"),
        (
            {"text_config": {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}},
            "rope_type 'dynamic'",
        ),
        ({"text_config": {"use_bidirectional_attention": True}}, "use_bidirectional_attention"),
        ({"text_config": {"attn_logit_softcapping": 50.0}}, "attn_logit_softcapping '50.0'"),
        ({"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping"),
        ({"mm_tokens_per_image": 250}, "mm_tokens_per_image 250 of 14 x 14"),
        ({"mm_tokens_per_image": 9}, "mm_tokens_per_image 9 of 14 x 14"),
        ({"mm_tokens_per_image": 0}, "mm_tokens_per_image 0 of 14 x 14"),
        ({"mm_tokens_per_image": -4}, "mm_tokens_per_image -4 of 14 x 14"),
        ({"mm_tokens_per_image": None}, "mm_tokens_per_image 0 of 14 x 14"),
        ({"vision_config": {"image_size": 8}, "mm_tokens_per_image": 1}, "1 of 0 x 0 patches"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        FAMILY.read_config(change)


def test_files_that_do_not_fit(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint(NARROW), tmp_path / "model"))
    config = FAMILY.read_config(json.loads((folder / "config.json").read_text()))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": 256}))
    with pytest.raises(CheckpointError, match=r"image_seq_length 256 .* mm_tokens_per_image 16"):
        FAMILY.images(config, folder)
    (folder / "processor_config.json").unlink()
    made = FAMILY.images(config, folder)
    assert made == replace(made, token="<image>", tokens=16, as_text=True, bidirectional=True)
    assert not made.independent_units  # a tower of many patches takes one image at a time
    assert (made.patches, made.patch_heads) == (64, 3)
    size = {"height": 28, "width": 28}
    processor = {"image_processor_type": "Gemma3ImageProcessor", "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(CheckpointError, match="the vision tower takes 64 x 64"):
        FAMILY.images(config, folder)
