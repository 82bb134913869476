"""Layers with a state of fixed size in an engine: whatever runs beside, and whatever was there
before, answers are those alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_tools import IMAGES, OTHERS, ask, idle, intercept, same, submit
from example_counts import whole

from lvlm.core.errors import BackendError
from lvlm.runtime.engine import Engine
from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.kv.cache import cache_bytes
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions

# Three of five layers convolve over three tokens; or have matrices besides
MODELS = ["lfm2-vl:gqa-conv-first", "qwen3.5:gqa-linear-first"]
ASKS = [
    *OTHERS,
    ask("How often does 7 appear?", (), max_new_tokens=9),
    ask("<image> or <image>?", (0, 1), chat_template=False),
    ask("Hi", (), max_new_tokens=12, ignore_eos=True),
]


@pytest.fixture(scope="module", params=MODELS if whole() else MODELS[:1])
def model(request: pytest.FixtureRequest, bundle: Callable[..., Path]) -> Iterator[Model]:
    with Model(bundle(request.param, max_images=2)) as found:
        yield found


@pytest.mark.parametrize("chunk", [None, 1, 2, 17])
def test_answers_beside_others_are_those_alone(model: Model, chunk: int | None) -> None:
    """Rows come, go and move; prompts are read at once, or in pieces shorter than a state."""
    expected = [each.alone(model) for each in ASKS]
    with Engine(model.folder, slots=3, chunk_tokens=chunk) as engine:
        for _ in range(2):  # the second time in rows that others left
            handles = [submit(engine, each) for each in ASKS]
            for handle, alone in zip(handles, expected, strict=True):
                same(handle.result(60), alone)
            idle(engine)


def test_several_answers_go_on_from_one_state(model: Model) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": 5, "max_new_tokens": 12}
    several = ask("Read the top row.", (1,), **options)
    alone = several.alone(model)
    assert len({tuple(one.token_ids) for one in (alone, *alone.others)}) > 1
    with Engine(model.folder, slots=4) as engine:
        same(engine.generate(*several.arguments, **several.options), alone)


def test_a_beginning_is_used_again_where_it_is_all_of_a_row(model: Model) -> None:
    """A state is that after a row's last token, which no shorter beginning can use."""
    options: dict[str, Any] = {"chat_template": False, "max_new_tokens": 1}
    first = ask("<image> what is in the top row", **options)
    other = ask("<image> what is in the bottom row", **options)
    longer = ask(f"{first.prompt} of <image>?", (0, 1), **options | {"max_new_tokens": 9})
    prompt = model.prepare(0, *first.arguments, GenerationOptions(chat_template=False))
    with Engine(model.folder, slots=3) as engine:
        for each in (first, other):
            same(engine.generate(*each.arguments, **each.options), each.alone(model))
        assert engine.stats().reused_tokens == 0
        handles = [submit(engine, longer) for _ in range(2)]
        for handle in handles:
            same(handle.result(60), longer.alone(model))
        # The second finds the row of the first answer, or that of the other one while it runs
        assert engine.stats().reused_tokens >= 2 * len(prompt.ids)


def test_a_conversation_goes_on(model: Model) -> None:
    image = {"type": "image", "image": IMAGES[0]}
    talk: list[dict[str, Any]] = [{"role": "user", "content": [image, text("What is it?")]}]
    with Engine(model.folder, slots=2) as engine, engine.session() as session:
        for number in range(3):
            # All of an answer but its last token stays: none, which no tokenizer splits otherwise
            said = engine.generate(talk, session=session, max_new_tokens=1)
            same(said, model.generate(talk, max_new_tokens=1))
            assert (engine.stats().reused_tokens > 0) == (number > 0)
            talk += [{"role": "assistant", "content": "Yes."}]
            talk += [{"role": "user", "content": [text(f"And number {number}?")]}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def failure(handle: Handle) -> str:
    """What a request failed with; "" if it did not."""
    try:
        handle.result(60)
    except BackendError as error:
        return str(error)
    return ""


def test_a_step_that_failed_is_not_run_again(model: Model) -> None:
    """States have gone on already: the requests of that step fail, later ones do not."""
    with Engine(model.folder, slots=3) as engine:
        decode = intercept(engine, "decode")
        handles = [submit(engine, each) for each in ASKS[:2]]
        rows: list[int] = []

        def fail(inputs: Any, _: Any) -> None:
            rows.append(len(inputs["input_ids"]))
            if rows[-1] == 2:
                raise BackendError("made to fail")

        decode.after = fail
        assert all("made to fail" in failure(handle) for handle in handles)
        assert rows.count(2) == 1
        assert rows[-1] == 2  # no row on its own afterwards
        decode.after = lambda *_: None
        same(engine.generate(*ASKS[2].arguments, **ASKS[2].options), ASKS[2].alone(model))


def test_states_are_counted(model: Model) -> None:
    manifest = model.manifest
    assert manifest.text.layers == 2
    states = {"lfm2-vl": ((3, 2, 64),), "qwen3.5": ((3, 3, 160), (3, 64, 24))}[manifest.family]
    assert manifest.text.states == states
    assert manifest.text.state_dtypes == ("float32",) * len(states)
    entries = 2 * manifest.text.kv_heads * manifest.text.head_dim * np.array([10, 10])
    held = sum(map(math.prod, states))
    assert cache_bytes(manifest, 3, [10, 10]) == 3 * 4 * (entries.sum() + held)
