"""Model: prompts and options that it takes or refuses, batches, statistics, loading and closing;
answers themselves are checked in tests/parity."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_tools import IMAGE, OTHER, QUESTION
from PIL import Image

import lvlm
from lvlm.core.errors import (
    BackendError,
    BundleError,
    ImageError,
    ParameterError,
    PromptError,
)
from lvlm.runtime.backends import open_backend
from lvlm.runtime.generate.answers import Stats
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions

# Prompts and options


@pytest.mark.parametrize(
    ("prompt", "images", "said"),
    [
        ("Hi", [IMAGE], "0 image placeholders for 1 image;"),
        ("<image> Hi", [], "1 image placeholder for 0 images;"),
        ("<image><image> Hi", [IMAGE], "2 image placeholders for 1 image;"),
        ("", [], "the prompt is empty"),
        (" \n", [], "the prompt is empty"),
        ("Hi", IMAGE, "write images="),
        ("Hi", str(IMAGE), "write images="),
        ("Hi", IMAGE.read_bytes(), "write images="),
        ("Hi", np.zeros((4, 4, 3), np.uint8), "write images="),
        ("Hi", Image.new("RGB", (4, 4)), "write images="),
        ("Hi", {"a": IMAGE}, "write images="),
    ],
    ids=range(11),
)
def test_prompt_errors(light: Model, prompt: str, images: Any, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        light.generate(prompt, images, chat_template=False)


@pytest.mark.parametrize(("prompt", "images"), [("Is <image> bold?", 0), ("<image> <image>?", 1)])
def test_a_question_that_quotes_the_placeholder(light: Model, prompt: str, images: int) -> None:
    with pytest.raises(
        PromptError, match=r"<image> stands for an image: .* as < image >$"
    ) as caught:
        light.generate(prompt, [IMAGE] * images)
    assert "chat template" not in str(caught.value)


OWN = "Q: {% for p in messages[0].content %}{{ p.text or '<image>' }}{% endfor %} A:"


def test_a_template_that_the_caller_gives(light: Model) -> None:
    given = GenerationOptions(chat_template=OWN)
    written = GenerationOptions(chat_template=False)
    ours = light.prepare(0, "Which?", [IMAGE], given).ids
    assert list(ours) == list(light.prepare(0, "Q: <image>Which? A:", [IMAGE], written).ids)
    for wrong, said in [
        ("vicuna", "does not write the question"),
        ("{% if %}", "is not valid"),
        ("{{ 1 // 0 }}", "does not write the question"),
        ("{{ 'a' * 10**10 }}", "does not write the question"),
    ]:
        with pytest.raises(ParameterError, match=f"the chat_template that was given {said}"):
            light.generate("Which?", [IMAGE], chat_template=wrong)


def test_an_answer_begins_after_the_templates_space(light: Model) -> None:
    """A prompt written out that ends otherwise is gone on with: the two are one text."""
    text, written = "USER: <image>\nWhich? ASSISTANT:", GenerationOptions(chat_template=False)
    answer = light.generate("Which?", [IMAGE])
    assert light.tokenizer.decode(answer.token_ids) == " " + answer.text
    assert light.generate(text, [IMAGE], options=written).text == answer.text
    assert "".join(light.stream("Which?", [IMAGE])) == answer.text
    other = light.generate(text + " The", [IMAGE], options=written)
    assert other.text == light.tokenizer.decode(other.token_ids)
    assert other.text.startswith(" ")


def test_empty_prompt_with_the_chat_template(light: Model) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        light.generate("")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 3}, "unknown option 'max_tokens'; did you mean max_new_tokens"),
        ({"temprature": 1.0}, "did you mean temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; give"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0; give"),
        ({"n": 0}, "n is 0; give"),
        ({"defaults": "checkpoint"}, "defaults is 'checkpoint'; give"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "7"}, "seed is '7'"),
        ({"stop": ""}, "stop is ''"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"stop": 5}, "stop is 5"),
        ({"keep": 0}, "keep is 0"),
        ({"keep": [0.5]}, "1 fractions for 3 reductions"),
        ({"keep": "0.5"}, "keep is '0.5'"),
    ],
)
def test_option_errors_come_before_any_work(
    light: Model, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(light, "prepare", None)  # calling it would be a TypeError
    with pytest.raises(ParameterError, match=said):
        light.generate(QUESTION, **options)
    with pytest.raises(ParameterError, match=said):
        light.stream(QUESTION, **options)


def test_system_needs_the_template(light: Model) -> None:
    with pytest.raises(ParameterError, match="system needs the chat template"):
        light.generate(QUESTION, system="Be brief.", chat_template=False)


def test_keep_needs_a_bundle_that_merges(bundle: Callable[..., Path]) -> None:
    with lvlm.load(bundle("digits-llava", max_images=2)) as model:
        with pytest.raises(ParameterError, match="needs a bundle with fewer image tokens"):
            model.generate(QUESTION, [IMAGE], keep=0.5)
        answer = model.generate(QUESTION, [IMAGE], keep=1.0, max_new_tokens=2)
    assert answer.merge_maps == []


def test_loading_errors(bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = bundle("digits-llava", max_images=2)
    with pytest.raises(ParameterError, match="unknown device 'cpi'; did you mean cpu"):
        lvlm.load(folder, device="cpi")
    for threads in (0, 300, 2**32 + 1, "2", True):
        with pytest.raises(ParameterError, match=rf"threads is '?{threads}'?; give 1 to \d+, as"):
            lvlm.load(folder, threads=threads)  # type: ignore[arg-type]
        with pytest.raises(ParameterError, match=r"threads is .* CPUs"):
            open_backend("cpu", threads=threads)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="does not exist"):
        lvlm.load(tmp_path / "none")
    for bundle_given in (None, 5, b"out"):
        with pytest.raises(ParameterError, match=r"^bundle is .*; give the path of a folder"):
            lvlm.load(bundle_given)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="unknown device"):
        lvlm.load(folder, device=None)  # type: ignore[arg-type]


PROMPTS = [None, b"Hi", 5, {"prompt": "Hi"}, ["Hi", None], [[], "Hi"]]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_what_a_prompt_may_be(light: Model, prompt: Any) -> None:
    wanted = "(text|the question as text|messages, as)"
    with pytest.raises(PromptError, match=rf"^prompt is .*; give {wanted}"):
        light.generate(prompt)
    with pytest.raises(PromptError, match=r"^prompt is .*; give the question as text"):
        light.stream(prompt)


def test_lists_of_images_may_be_left_out(light: Model) -> None:
    answers = light.generate(("Hi", "Hi"), [None, []], None, max_new_tokens=2)  # type: ignore[call-overload]
    assert answers[0].token_ids == answers[1].token_ids
    assert light.generate("Hi", None, max_new_tokens=2).token_ids == answers[0].token_ids
    for images in ([IMAGE] * 2, {"a": IMAGE}, IMAGE):
        with pytest.raises(PromptError, match=r"^images is .*(write images=|one list each)"):
            light.generate(["Hi", "Ho"], images)  # type: ignore[arg-type]


def test_bf16_is_refused_on_the_cpu(bundle: Callable[..., Path]) -> None:
    with pytest.raises(BackendError, match=r"bf16, which is for GPU.* --dtype fp32") as caught:
        lvlm.load(bundle("digits-llava", dtype="bf16", max_images=2))
    assert "\n" not in str(caught.value)


def test_every_source_of_an_image_gives_the_same_answer(light: Model) -> None:
    with Image.open(IMAGE) as file:
        image = file.convert("RGB")
    saved = io.BytesIO()
    image.save(saved, "PNG")
    sources = [IMAGE, str(IMAGE), saved.getvalue(), image, np.asarray(image)]
    answers = [light.generate(QUESTION, [s], max_new_tokens=8).token_ids for s in sources]
    assert answers == [answers[0]] * len(sources)
    with pytest.raises(ImageError, match="does not exist"):
        light.generate(QUESTION, ["no.png"])


# Batches


def test_batches(light: Model) -> None:
    assert light.generate([]) == []
    prompts = [QUESTION, "Read the top row.", "Hi"]
    images = [[IMAGE], [IMAGE, OTHER], []]
    together = light.generate(prompts, images, max_new_tokens=10)
    alone = [light.generate(p, i, max_new_tokens=10) for p, i in zip(prompts, images, strict=True)]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert [g.text for g in together] == [g.text for g in alone]
    assert [g.stats.image_tokens for g in together] == [144, 288, 0]
    assert len(light.generate(["Hi", "Hello"], max_new_tokens=2)) == 2
    for wrong in ([[IMAGE]], [[], [], []]):
        with pytest.raises(PromptError, match="2 prompts but"):
            light.generate(["Hi", "Hello"], wrong)
    with pytest.raises(PromptError, match="write images="):
        light.generate(["Hi", "Hello"], [str(IMAGE), str(OTHER)])


def test_stats_and_maps_fit_together(light: Model) -> None:
    answer = light.generate(QUESTION, [IMAGE, OTHER], max_new_tokens=5, keep=(0.5, 0.25, 0.1))
    stats = answer.stats
    assert isinstance(stats, Stats)
    text = stats.prompt_tokens - stats.image_tokens
    left = [144, 72, 36, 14, 14, 14]
    assert stats.image_tokens_per_layer == tuple(2 * n for n in left)
    assert stats.tokens_per_layer == tuple(2 * n + text for n in left)
    assert len(answer.image_id) == stats.prompt_tokens
    assert np.bincount(answer.image_id).tolist() == [text, 144, 144]
    assert [len(m) for m in answer.merge_maps] == [2 * n + text for n in left[:3]]
    for merge_map, after in zip(answer.merge_maps, left[1:], strict=False):
        assert merge_map.max() == 2 * after + text - 1
    assert stats.new_tokens == len(answer.token_ids)
    assert stats.decode_steps == stats.new_tokens - 1
    assert 0 < stats.cache_bytes_used < stats.cache_bytes_allocated
    assert min(stats.vision_ms, stats.prefill_ms, stats.decode_ms) > 0
    assert stats.decode_tokens_per_second == pytest.approx(
        1e3 * stats.decode_steps / stats.decode_ms
    )


def test_a_failed_call_leaves_the_model_usable(light: Model) -> None:
    with pytest.raises(ImageError):
        light.generate(QUESTION, ["no.png"])
    assert light.generate("Hi", max_new_tokens=1).token_ids


def test_a_closed_model_says_so(bundle: Callable[..., Path]) -> None:
    model = lvlm.load(bundle("digits-llava", max_images=2))
    with model as same:
        assert same is model
    for call in (lambda: model.generate("Hi"), lambda: list(model.stream("Hi"))):
        with pytest.raises(BackendError, match="this model is closed"):
            call()
    model.close()  # twice is fine
