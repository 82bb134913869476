"""Model: what it refuses, what it promises; answers themselves are checked in test_parity."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_tools import intercept
from PIL import Image
from settings import ASSETS

import lvlm
from lvlm.core.errors import (
    BackendError,
    BundleError,
    CapacityError,
    ImageError,
    ParameterError,
    PromptError,
)
from lvlm.runtime.backends import open_backend
from lvlm.runtime.generate.answers import Generation, Stats
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.sampling.sampler import Sampler

IMAGE = ASSETS / "samples/digits-1.png"
OTHER = ASSETS / "samples/digits-2.png"
QUESTION = "Describe the picture."
AS_IT_IS: dict[str, Any] = {"chat_template": False}


@pytest.fixture(scope="module")
def light(bundle: Callable[..., Path]) -> Iterator[Model]:
    with lvlm.load(bundle("tiny-llava", "lightvlm", max_images=2), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def small(bundle: Callable[..., Path]) -> Iterator[Model]:
    """32 text tokens and one image."""
    with lvlm.load(bundle("tiny-llava", "lightvlm", max_text_len=32), threads=1) as model:
        yield model


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model never ends an answer by itself."""
    monkeypatch.setattr(Sampler, "choose", lambda self, logits: 20)  # noqa: ARG005


def text_of(model: Model, tokens: int, start: str = "") -> str:
    """A prompt of exactly so many text tokens, as it stands."""
    text = start
    images = [IMAGE] * start.count("<image>")
    for _ in range(4 * tokens):
        prompt = model.prepare(0, text or "7", images, GenerationOptions(chat_template=False))
        count = int((prompt.image_id == 0).sum())
        if count == tokens:
            return text
        text += "7"
    raise AssertionError(f"no prompt of {tokens} tokens")


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
        ({"max_new_tokens": None}, "max_new_tokens is None; give"),
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
    with lvlm.load(bundle("tiny-llava", max_images=2)) as model:
        with pytest.raises(ParameterError, match="needs a bundle with token merging"):
            model.generate(QUESTION, [IMAGE], keep=0.5)
        answer = model.generate(QUESTION, [IMAGE], keep=1.0, max_new_tokens=2)
    assert answer.merge_maps == []


def test_loading_errors(bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = bundle("tiny-llava", max_images=2)
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


PROMPTS = [None, b"Hi", 5, {"prompt": "Hi"}, [{"role": "user", "content": "Hi"}], ["Hi", None]]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_what_a_prompt_may_be(light: Model, prompt: Any) -> None:
    with pytest.raises(PromptError, match=r"^prompt is .*; give (text|the question as text)"):
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


def test_which_stop(light: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A special token is matched by its id, a text by what is decoded."""
    tokens = iter([])
    monkeypatch.setattr(Sampler, "choose", lambda self, logits: next(tokens))  # noqa: ARG005

    def answer(*chosen: int, **options: Any) -> Generation:
        nonlocal tokens
        tokens = iter(chosen)
        return light.generate("Hi", **options)

    end = light.tokenizer.token_id("</s>")
    found = answer(20, 21, end, ignore_eos=True, stop=["</s>"])
    assert (found.token_ids, found.finish_reason, found.stop_reason) == (
        [20, 21, end],
        "stop",
        "</s>",
    )
    text = found.text
    found = answer(20, 21, end)
    assert (found.text, found.finish_reason, found.stop_reason) == (text, "stop", end)
    found = answer(20, 21, max_new_tokens=2)
    assert (found.text, found.finish_reason, found.stop_reason) == (text, "length", None)
    found = answer(20, 21, 20, 21, stop=[text[-1:]])
    assert (found.finish_reason, found.stop_reason) == ("stop", text[-1:])
    with pytest.raises(ParameterError, match="special token '</s>' and more"):
        light.stream("Hi", stop=["</s> and"])


def test_bf16_is_refused_on_the_cpu(bundle: Callable[..., Path]) -> None:
    with pytest.raises(BackendError, match=r"bf16, which is for GPU.* --dtype fp32") as caught:
        lvlm.load(bundle("tiny-llava", dtype="bf16"))
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


# Capacity


def test_text_up_to_one_token_below_the_limit(small: Model) -> None:
    for start, images in (("", []), ("<image>", [IMAGE])):
        answer = small.generate(text_of(small, 31, start), images, **AS_IT_IS)
        assert len(answer.token_ids) == 1
        assert answer.stats.prompt_tokens - answer.stats.image_tokens == 31
        with pytest.raises(CapacityError, match=r"32 text tokens.*--max-text-len 32"):
            small.generate(text_of(small, 32, start), images, **AS_IT_IS)


@pytest.mark.usefixtures("endless")
def test_answer_ends_at_the_capacity(small: Model) -> None:
    prompt = text_of(small, 25)
    for want, got in ((7, 7), (6, 6), (8, 7), (50, 7)):
        answer = small.generate(prompt, max_new_tokens=want, **AS_IT_IS)
        assert (len(answer.token_ids), answer.finish_reason) == (got, "length")
        assert answer.stats.new_tokens == got


@pytest.mark.usefixtures("endless")
def test_rows_of_a_batch_have_their_own_limits(small: Model) -> None:
    prompts = [text_of(small, n) for n in (31, 29)]
    answers = small.generate(prompts, max_new_tokens=50, **AS_IT_IS)
    assert [len(a.token_ids) for a in answers] == [1, 3]
    assert [a.finish_reason for a in answers] == ["length", "length"]


def test_too_many_images(small: Model) -> None:
    with pytest.raises(CapacityError, match=r"2 images.*--max-images 1"):
        small.generate("Hi", [IMAGE, OTHER])


@pytest.mark.usefixtures("endless")
def test_more_kept_than_exported_may_exceed_the_cache(small: Model) -> None:
    text = int((small.prepare(0, QUESTION, [IMAGE], GenerationOptions()).image_id == 0).sum())
    with pytest.raises(
        CapacityError, match=r"layer 3 needs 128 cache entries, there are 82; lower keep or kv_keep"
    ):
        small.generate(QUESTION, [IMAGE], keep=1.0)
    # A little more fits and leaves less room for the answer.
    answer = small.generate(QUESTION, [IMAGE], keep=0.5, max_new_tokens=50)
    assert answer.finish_reason == "length"
    assert answer.capacity_reached
    assert len(answer.token_ids) == 82 - 72 - text + 1  # the last one needs no slot


# Streams, stop strings, seeds


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "seed": 3}], ids=["greedy", "drawn"])
def test_pieces_of_a_stream_are_the_text(light: Model, options: dict[str, Any]) -> None:
    answer = light.generate(QUESTION, [IMAGE], max_new_tokens=40, **options)
    stream = light.stream(QUESTION, [IMAGE], max_new_tokens=40, **options)
    assert stream.result is None
    pieces = list(stream)
    assert len(pieces) > 3
    assert all(pieces)
    assert "".join(pieces) == answer.text
    assert stream.result is not None
    assert stream.result.token_ids == answer.token_ids
    assert stream.result.text == answer.text


def test_stop_strings_cut_the_answer(light: Model) -> None:
    whole = light.generate(QUESTION, [IMAGE], max_new_tokens=40)
    for stop in (whole.text[9:14], whole.text[3:4], [whole.text[12:20], "nowhere in it"]):
        first = stop if isinstance(stop, str) else stop[0]
        answer = light.generate(QUESTION, [IMAGE], max_new_tokens=40, stop=stop)
        assert answer.text == whole.text[: whole.text.index(first)]
        assert answer.finish_reason == "stop"
        assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
        assert len(answer.token_ids) < len(whole.token_ids)
        stream = light.stream(QUESTION, [IMAGE], max_new_tokens=40, stop=stop)
        assert "".join(stream) == answer.text
    unstopped = light.generate(QUESTION, [IMAGE], max_new_tokens=40, stop=["nowhere in it"])
    assert unstopped.text == whole.text


def test_seed_repeats_draws(light: Model) -> None:
    drawn: dict[str, Any] = {"temperature": 5.0, "max_new_tokens": 12}
    first = light.generate(QUESTION, seed=7, **drawn).token_ids
    assert light.generate(QUESTION, seed=7, **drawn).token_ids == first
    assert light.generate(QUESTION, seed=8, **drawn).token_ids != first
    assert light.generate(QUESTION, **drawn).token_ids != first
    # Equal prompts of a batch differ: row r draws with seed + r.
    rows = light.generate([QUESTION, QUESTION], seed=7, **drawn)
    assert rows[0].token_ids == first
    assert rows[1].token_ids == light.generate(QUESTION, seed=8, **drawn).token_ids


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


# Answers that are given


def test_a_score_is_that_of_the_model_s_own_choice(light: Model) -> None:
    asks = (["Read the top row.", "Hi"], [[IMAGE, OTHER], []])
    options: dict[str, Any] = {"keep": 0.3, "kv_keep": 0.5, "logprobs": 2, "max_new_tokens": 20}
    own = light.generate(*asks, ignore_eos=True, **options)
    answers = [own[0].token_ids, own[1].token_ids[:7]]
    fed = light.score(asks[0], answers, asks[1], stop=("e",), **options)
    for mine, theirs, tokens in zip(fed, own, answers, strict=True):
        assert mine.token_ids == tokens
        assert mine.scores == theirs.scores[: len(tokens)]
        assert mine.finish_reason == "length"
    assert fed[0].text == own[0].text
    assert fed[0].stats.cache_bytes_used == own[0].stats.cache_bytes_used
    alone = light.score(asks[0][1], np.array(answers[1]), keep=0.3, kv_keep=0.5)
    assert alone.token_ids == answers[1]
    assert all(score.top == () for score in alone.scores)
    other = [5] * 7
    assert sum(s.logprob for s in light.score("Hi", other).scores) < sum(
        s.logprob for s in alone.scores
    )


def test_what_cannot_be_scored(light: Model) -> None:
    for wrong in ([], [-1], [10**6], [0.5], "7", 7, None):
        with pytest.raises(ParameterError, match=r"^answer is .*; give token ids, one or more"):
            light.score("Hi", wrong)  # type: ignore[call-overload]
    with pytest.raises(ParameterError, match="2 prompts but 1 answers"):
        light.score(["Hi", "Hello"], [[5]])
    most = light.manifest.capacity.max_text_len
    with pytest.raises(CapacityError, match=f"answer has {most} tokens, but there is room"):
        light.score("Hi", [5] * most)
    assert light.generate("Hi", max_new_tokens=1).token_ids


def test_a_score_of_what_is_not_finite(bundle: Callable[..., Path]) -> None:
    with lvlm.load(bundle("tiny-llava", max_images=2)) as model:

        def spoil(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
            outputs["logits"][0, 9] = np.inf

        intercept(model, "decode").after = spoil
        with pytest.raises(BackendError, match="logits contain NaN or infinity"):
            model.score("Hi", [5, 6])


def test_times_of_a_stream(light: Model) -> None:
    """One for each token, whether or not its text is final."""
    began = time.perf_counter()
    with light.stream(QUESTION, [IMAGE], max_new_tokens=9, ignore_eos=True) as stream:
        assert stream.token_times == []
        next(stream)
        assert len(stream.token_times) > 0
        list(stream)
    times = [began, *stream.token_times, time.perf_counter()]
    assert times == sorted(times)
    assert len(times) == 11


# One call at a time; closing


def test_a_second_call_is_refused_until_the_stream_ends(light: Model) -> None:
    stream = light.stream(QUESTION, [IMAGE], max_new_tokens=20)
    light.generate(QUESTION, max_new_tokens=1)  # nothing has begun yet
    next(iter(stream))
    for call in (
        lambda: light.generate("Hi"),
        lambda: list(light.stream("Hi")),
    ):
        with pytest.raises(BackendError, match="answering another call"):
            call()
    stream.close()
    assert stream.result is None
    assert light.generate("Hi", max_new_tokens=1).token_ids


def test_a_failed_call_leaves_the_model_usable(light: Model) -> None:
    with pytest.raises(ImageError):
        light.generate(QUESTION, ["no.png"])
    assert light.generate("Hi", max_new_tokens=1).token_ids


def test_a_closed_model_says_so(bundle: Callable[..., Path]) -> None:
    model = lvlm.load(bundle("tiny-llava", max_images=2))
    with model as same:
        assert same is model
    for call in (lambda: model.generate("Hi"), lambda: list(model.stream("Hi"))):
        with pytest.raises(BackendError, match="this model is closed"):
            call()
    model.close()  # twice is fine


# The cache is written in place


@pytest.mark.usefixtures("endless")
def test_decode_writes_one_slot_in_place(light: Model) -> None:
    prompts = [
        light.prepare(0, QUESTION, [IMAGE], GenerationOptions()),
        light.prepare(1, "Read the top row.", [IMAGE, OTHER], GenerationOptions()),
    ]
    batch = light.calls.start(prompts)
    cache = batch.cache
    addresses = {name: b.ctypes.data for name, b in cache.buffers.items()}
    allocated = cache.bytes_allocated
    for _ in range(5):
        before = {name: b.copy() for name, b in cache.buffers.items()}
        index, _ = cache.next_slot()
        ring = cache.query_index
        batch.choose(range(2))
        batch.decode_step()
        for name, buffer in cache.buffers.items():
            layer = int(name.rpartition("_")[2])
            changed = (buffer != before[name]).any((1, 3))
            for row in range(2):
                slot = ring[row] if name.startswith("query") else index[layer, row]
                assert np.flatnonzero(changed[row]).tolist() == [slot]
        np.testing.assert_array_equal(cache.lengths, index + 1)
    assert {name: b.ctypes.data for name, b in cache.buffers.items()} == addresses
    assert cache.bytes_allocated == allocated == sum(b.nbytes for b in cache.buffers.values())


def test_buffers_are_used_again(light: Model) -> None:
    prompt = light.prepare(0, QUESTION, [IMAGE], GenerationOptions())
    first = light.calls.start([prompt]).cache
    assert light.calls.start([prompt]).cache is first
    assert light.calls.start([prompt, prompt]).cache is not first
