"""The engine's answers: those of a model that is asked one thing at a time, whatever runs beside
them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_tools import IMAGES, LONG, QUESTION, WAIT, Ask, ask, idle, same, submit
from example_counts import examples
from fake_driver import FakeDriver
from fake_engines import Make
from fake_tensorrt import FakeTensorRt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from settings import CACHED, LIGHTVLM

import lvlm
from lvlm.core.errors import CapacityError, ParameterError, PromptError, QueueFullError
from lvlm.runtime.engine import Engine, Handle
from lvlm.runtime.kv.static_capacity import static_capacity
from lvlm.runtime.model import Model

RECIPES = {"none": ("none",), "lightvlm": LIGHTVLM, **CACHED}
PROMPTS = (QUESTION, "Read the top row.", "Hi", "What is in row 2, column 3?")


def jobs(recipe: str, count: int, seed: int) -> list[Ask]:
    """Requests of all kinds."""
    rng = random.Random(seed)

    def one() -> Ask:
        options = {"max_new_tokens": rng.choice([1, 3, 8, 20])}
        if rng.random() < 0.3:
            options |= {"temperature": 0.8, "seed": rng.randrange(100)}
        if rng.random() < 0.3:
            options |= {"logprobs": rng.randrange(3)}
        if rng.random() < 0.2:
            options |= {"stop": (rng.choice("0123456789"),)}
        if rng.random() < 0.3:
            options |= {"ignore_eos": True}
        if recipe in CACHED and rng.random() < 0.7:
            options |= {"kv_keep": rng.choice([0.3, 0.5, 1.0])}
        if "lightvlm" in recipe and rng.random() < 0.5:
            options |= {"keep": rng.choice([0.25, 0.5])}
        images = rng.choice([(), (0,), (1,), (0, 1)])
        return Ask(rng.choice(PROMPTS), images, options)

    return [one() for _ in range(count)]


def folder_of(bundle: Callable[..., Path], recipe: str) -> Path:
    return bundle("digits-llava", *RECIPES[recipe], max_images=2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_answers_are_those_alone(recipe: str, bundle: Callable[..., Path]) -> None:
    """Random arrivals on three slots: requests join and leave between any two steps."""
    folder, asks, rng = folder_of(bundle, recipe), jobs(recipe, 14, 7), random.Random(1)
    with lvlm.load(folder) as model:
        expected = [a.alone(model) for a in asks]
    with Engine(folder, slots=3) as engine:
        handles = []
        for a in asks:
            handles.append(submit(engine, a))
            time.sleep(rng.random() * 0.01)
        for handle, one in zip(handles, expected, strict=True):
            same(handle.result(WAIT), one)
            assert list(handle) == [p for p in handle._pieces if p]
            assert "".join(handle) == one.text
            assert list(handle.tokens()) == handle.token_ids == one.token_ids
            assert len(handle.token_times) == len(one.token_ids)
            assert handle.token_times == sorted(handle.token_times)
        idle(engine)
        assert engine.images.misses <= 2  # each image was encoded once


@pytest.mark.parametrize(("slots", "chunk"), [(1, None), (1, 0), (3, 0)])
def test_other_schedules(slots: int, chunk: int | None, bundle: Callable[..., Path]) -> None:
    """One slot; and prompts that are read as a whole."""
    folder, asks = folder_of(bundle, "none"), jobs("none", 10, 3)
    with lvlm.load(folder) as model:
        expected = [a.alone(model) for a in asks]
    with Engine(folder, slots=slots, chunk_tokens=chunk) as engine:
        handles = [submit(engine, a) for a in asks]
        for handle, one in zip(handles, expected, strict=True):
            same(handle.result(WAIT), one)
        idle(engine)


@pytest.fixture(scope="module")
def light(bundle: Callable[..., Path]) -> Iterator[tuple[Model, Engine]]:
    folder = folder_of(bundle, "lightvlm (cached)")
    with lvlm.load(folder) as model, Engine(folder, slots=3) as engine:
        yield model, engine


ASKS = st.builds(
    ask,
    st.sampled_from(PROMPTS),
    st.sampled_from([(), (0,), (1, 0)]),
    max_new_tokens=st.integers(1, 24),
    kv_keep=st.sampled_from([0.25, 0.6, None]),
    ignore_eos=st.booleans(),
    seed=st.integers(0, 9),
    temperature=st.sampled_from([0.0, 1.0]),
)


@settings(
    deadline=None,
    max_examples=examples(8),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(ASKS, st.booleans()), min_size=1, max_size=6))
def test_any_mix(light: tuple[Model, Engine], mix: list[tuple[Ask, bool]]) -> None:
    """Some of them are cancelled, which changes nothing for the others."""
    model, engine = light
    handles = [(a, submit(engine, a), c) for a, c in mix]
    for _, handle, cancelled in handles:
        if cancelled:
            handle.cancel()
    for a, handle, cancelled in handles:
        if not cancelled:
            same(handle.result(WAIT), a.alone(model))
    idle(engine)


@pytest.mark.parametrize("recipe", ["none", "interval"])
def test_engines_of_tensorrt(recipe: str, built: Make, trt: FakeTensorRt) -> None:
    """Static capacities, one thread, rows of device memory."""
    folder = built(recipe)
    ratio = {"kv_keep": 0.5} if recipe == "interval" else {}
    asks = [ask(p, (i % 2,), max_new_tokens=5 + 7 * i, **ratio) for i, p in enumerate(PROMPTS)]
    with lvlm.load(folder) as model:
        expected = [a.alone(model) for a in asks]
    with Engine(folder, device="tensorrt-rtx", slots=2) as engine:
        assert engine.capacity == static_capacity(engine.manifest)
        handles = [submit(engine, a) for a in asks]
        for handle, one in zip(handles, expected, strict=True):
            same(handle.result(WAIT), one)
        idle(engine)
    assert trt.libraries == []


@pytest.mark.usefixtures("endless")
def test_captured_steps_serve_whoever_joins_or_leaves(
    built: Make, driver: FakeDriver, trt: FakeTensorRt
) -> None:
    """A batch size is captured once, however often it comes again."""
    assert trt.libraries == []
    with Engine(built(), device="tensorrt-rtx", slots=3) as engine:
        longest = max(PROMPTS, key=len)
        submit(engine, ask(longest, (), max_new_tokens=4, n=3)).result(WAIT)  # memory for the rest
        for _ in range(3):
            asks = [ask(p, (), max_new_tokens=4 + 6 * i) for i, p in enumerate(PROMPTS[:3])]
            for handle in [submit(engine, a) for a in asks]:
                handle.result(WAIT)
        idle(engine)
    captured = driver.kinds().count("capture")
    assert 0 < captured <= 3  # of one, two and three rows
    plain = [event[1] for event in driver.events if event[0] == "run"].count("decode")
    assert plain <= 3
    assert driver.kinds().count("launch") > 3 * 10


# Prefixes and images


def test_a_second_question_about_the_same_image(bundle: Callable[..., Path]) -> None:
    """Its image is not read again, unless the recipe decides with the whole prompt."""
    other = [ask("Read the top row."), ask(QUESTION, (1,)), ask(QUESTION, (0, 1)), ask()]
    with lvlm.load(folder_of(bundle, "none")) as model:
        expected = [a.alone(model) for a in [ask(), *other]]
    for reuse in (True, False):
        with Engine(folder_of(bundle, "none"), slots=1, reuse_prefixes=reuse) as engine:
            got = [engine.generate(*a.arguments, **a.options) for a in [ask(), *other]]
            for ours, theirs in zip(got, expected, strict=True):
                same(ours, theirs)
            reused = [g.stats.reused_tokens for g in got]
            assert reused[0] == reused[2] == reused[3] == 0  # nothing yet, other images
            shared = got[1].stats.reused_tokens
            if reuse:
                assert got[1].stats.image_tokens < shared < got[1].stats.prompt_tokens
                assert got[1].stats.prefill_ms > 0
                assert reused[4] > got[4].stats.image_tokens  # the first of two images
            else:
                assert shared == 0
            assert (engine.images.misses, engine.images.hits) == (2, 2 if reuse else 4)
    for recipe in ("lightvlm", "uniform (cached)"):
        with Engine(folder_of(bundle, recipe), slots=2) as engine:
            twice = [engine.generate(QUESTION, IMAGES[:1], max_new_tokens=3) for _ in range(2)]
            assert [g.stats.reused_tokens for g in twice] == [0, 0]
            assert (engine.images.misses, engine.images.hits) == (1, 1)


def test_the_same_beginning_with_other_options(bundle: Callable[..., Path]) -> None:
    """What a prefix holds does not depend on how tokens are chosen, and no choice on what is held;
    another system message is another beginning."""
    options: list[dict[str, Any]] = [
        *({}, {"repetition_penalty": 1.4}, {"temperature": 0.8, "seed": 3}, {"logprobs": 2}),
        *({"stop": ["e"]}, {"system": "Be brief"}),
    ]
    asks = [ask(QUESTION + end, **given) for end in ("", " Now!") for given in options]
    folder = folder_of(bundle, "none")
    with lvlm.load(folder) as model:
        expected = [a.alone(model) for a in asks]
    with Engine(folder, slots=3) as engine:
        handles = [submit(engine, a) for a in asks]
        got = [handle.result(WAIT) for handle in handles]
    for ours, theirs in zip(got, expected, strict=True):
        same(ours, theirs)
    assert any(g.stats.reused_tokens for g in got)


def test_a_prefix_of_a_request_that_still_runs(bundle: Callable[..., Path]) -> None:
    first, second = ask(max_new_tokens=20, ignore_eos=True), ask("Read the top row.")
    folder = folder_of(bundle, "none")
    with lvlm.load(folder) as model:
        expected = [a.alone(model) for a in (first, second)]
    with Engine(folder, slots=2) as engine:
        running = submit(engine, first)
        next(running.tokens())
        got = engine.generate(*second.arguments, **second.options)
        same(got, expected[1])
        same(running.result(WAIT), expected[0])
        assert got.stats.reused_tokens > got.stats.image_tokens


# What is refused at once


def test_mistakes_are_raised_by_submit(bundle: Callable[..., Path]) -> None:
    folder = folder_of(bundle, "none")
    with Engine(folder, slots=1, max_text_len=24, max_images=1) as engine:
        for wrong in (0, -1, "soon", float("nan"), True):
            with pytest.raises(ParameterError, match="timeout is"):
                engine.submit(QUESTION, timeout=wrong)  # type: ignore[arg-type]
        for wrong in (-1, "soon", float("nan"), True):
            with pytest.raises(ParameterError, match="timeout is"):
                Handle(lambda: None).result(wrong)  # type: ignore[arg-type]
        with pytest.raises(ParameterError, match="max_new_tokens is 0"):
            engine.submit(QUESTION, max_new_tokens=0)
        with pytest.raises(ParameterError, match="option 'sead'"):
            engine.submit(QUESTION, sead=1)
        for empty in ("", " \n"):
            with pytest.raises(PromptError, match="the prompt is empty"):
                engine.submit(empty)
        with pytest.raises(PromptError, match="the prompt is empty"):
            engine.submit("", chat_template=False)
        with pytest.raises(CapacityError, match="2 images"):
            engine.submit(QUESTION, IMAGES)
        with pytest.raises(CapacityError, match="text tokens"):
            engine.submit("7 " * 40)
        cut = engine.generate("Hi", ignore_eos=True, max_new_tokens=200)
        assert cut.capacity_reached
        assert cut.stats.prompt_tokens + len(cut.token_ids) == 24
        idle(engine)


def test_no_more_than_the_queue_holds(bundle: Callable[..., Path]) -> None:
    with Engine(folder_of(bundle, "none"), slots=1, queue_limit=2) as engine:
        running = engine.submit(QUESTION, **LONG)
        next(running.tokens())  # it has left the queue
        waiting = [engine.submit("Hi", max_new_tokens=2) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests are waiting already; try again"):
            engine.submit("Hi")
        waiting[0].cancel()
        running.cancel()
        assert waiting[1].result(WAIT).token_ids
        idle(engine)
    for wrong in (0, True, "3"):
        with pytest.raises(ParameterError, match="queue_limit"):
            Engine(folder_of(bundle, "none"), queue_limit=wrong)  # type: ignore[arg-type]


def test_first_come_first_served(bundle: Callable[..., Path]) -> None:
    """Short and long ones start in the order in which they came."""
    with Engine(folder_of(bundle, "none"), slots=2) as engine:
        lengths = [30, 2, 25, 3, 20, 1, 4]
        handles = [engine.submit("Hi", max_new_tokens=n, ignore_eos=True) for n in lengths]
        results = [handle.result(WAIT) for handle in handles]
        starts = [handle.token_times[0] for handle in handles]
        assert starts == sorted(starts)
        assert [len(r.token_ids) for r in results] == lengths
        # The second leaves while the first runs, and the third joins.
        assert handles[2].token_times[0] < handles[0].token_times[-1]
        assert all(r.stats.queued_ms >= 0 for r in results)
