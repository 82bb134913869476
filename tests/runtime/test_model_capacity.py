"""Model: what fits a bundle's capacity, and where an answer ends at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from model_tools import AS_IT_IS, IMAGE, OTHER, QUESTION, text_of
from settings import LIGHTVLM

import lvlm
from lvlm.core.errors import (
    CapacityError,
)
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions


@pytest.fixture(scope="module")
def small(bundle: Callable[..., Path]) -> Iterator[Model]:
    """32 text tokens and one image."""
    with lvlm.load(bundle("digits-llava", *LIGHTVLM, max_text_len=32), threads=1) as model:
        yield model


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
