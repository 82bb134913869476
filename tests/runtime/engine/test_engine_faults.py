"""Faults of one request are its own: it gets its error, its slot is free and clean, and all others
go on as if nothing had been."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_tools import (
    IMAGES,
    OTHERS,
    QUESTION,
    SHORT,
    WAIT,
    answers,
    ask,
    idle,
    intercept,
    logged,
    scheduler,
    short_row,
    submit,
    until,
)
from settings import CACHED

import lvlm
from lvlm.core.errors import BackendError, DeviceMemoryError, EngineClosedError
from lvlm.runtime.engine import Engine, Handle
from lvlm.runtime.generate.answers import Generation

# Exceptions inside the backend


def test_a_decode_that_fails_once(whole: Engine, expected: list[Generation]) -> None:
    """Nobody notices: the step is done again, row by row."""
    engine = whole
    decode, failures = intercept(engine, "decode"), iter([KeyError("odd")])
    asked = threading.Event()

    def before(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
        assert asked.wait(WAIT)  # the second request is read after a few steps of the first
        if len(inputs["input_ids"]) == 2 and (error := next(failures, None)) is not None:
            raise error

    decode.before = before
    with answers(engine, OTHERS, expected):
        asked.set()
    assert list(failures) == []


@pytest.mark.parametrize("late", [False, True], ids=["before", "after the buffers are written"])
def test_a_decode_that_fails_for_one_row(
    late: bool, engine: Engine, expected: list[Generation]
) -> None:
    decode, steps = intercept(engine, "decode"), list[int]()

    def fail(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
        steps.extend(inputs["position_ids"][short_row(inputs)].ravel())
        if short_row(inputs).any() and steps[-1] > steps[0] + 3:
            raise ZeroDivisionError("by zero\nand more")

    if late:
        decode.after = fail
    else:
        decode.before = fail
    with answers(engine, OTHERS, expected):
        handle = submit(engine, SHORT)
        with pytest.raises(
            BackendError, match=r"^the backend failed \(ZeroDivisionError: by zero\); the r.* lost$"
        ):
            handle.result(WAIT)
        with pytest.raises(BackendError, match="by zero"):
            list(handle)
        assert len(handle.token_ids) == 5  # those before the fault stay
    decode.before = decode.after = lambda inputs, outputs: None  # noqa: ARG005
    assert len(submit(engine, SHORT).result(WAIT).token_ids) == 12


def test_a_decode_that_always_fails(engine: Engine, expected: list[Generation]) -> None:
    """Each request has an error of its own, of the backend's class; the engine goes on."""
    decode = intercept(engine, "decode")

    def fail(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
        raise DeviceMemoryError("no room; give less")

    decode.before = fail
    handles = [submit(engine, a) for a in [*OTHERS, SHORT, *OTHERS]]
    errors = [handle_error(handle) for handle in handles]
    assert [type(error) for error in errors] == [DeviceMemoryError] * 5
    assert len(set(map(id, errors))) == 5
    decode.before = lambda inputs, outputs: None  # noqa: ARG005
    with answers(engine, OTHERS, expected):
        pass


def handle_error(handle: Handle) -> BaseException:
    with pytest.raises(lvlm.LvlmError) as caught:
        handle.result(WAIT)
    return caught.value


@pytest.mark.parametrize("graph", ["vision", "prefill"])
def test_a_prompt_that_cannot_be_read(
    graph: str, whole: Engine, expected: list[Generation]
) -> None:
    engine = whole
    faulty = intercept(engine, graph)

    def fail(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
        if graph == "vision":
            odd = faulty.calls > len(OTHERS)  # which have an image each, and come first
        else:
            odd = len(inputs["image_features"]) > engine.manifest.images.tokens
        if odd:
            raise RuntimeError("out of luck")

    faulty.before = fail
    with answers(engine, OTHERS, expected):
        odd = ask("Hi", (0, 1), max_new_tokens=3)
        # An image that is known already is not encoded again
        handle = engine.submit(odd.prompt, [turned(p) for p in IMAGES], **odd.options)
        with pytest.raises(BackendError, match=r"the backend failed .*out of luck"):
            handle.result(WAIT)
        assert handle.text == ""
        assert handle.token_ids == []
    faulty.before = lambda inputs, outputs: None  # noqa: ARG005
    assert engine.generate("Hi", [turned(p) for p in IMAGES], max_new_tokens=3).token_ids


def turned(path: Path) -> np.ndarray:
    from PIL import Image

    return np.array(Image.open(path).convert("RGB").rotate(90))


def test_a_compaction_that_fails(bundle: Callable[..., Path]) -> None:
    """The requests whose entries were to be dropped are lost, the others are not."""
    folder = bundle("digits-llava", *CACHED["lightvlm (cached)"], max_images=2)
    whole = ask(max_new_tokens=40, ignore_eos=True, kv_keep=1.0)
    half = ask("Read the top row.", (1,), max_new_tokens=40, ignore_eos=True, kv_keep=0.5)
    with lvlm.load(folder) as model:
        expected = [whole.alone(model), half.alone(model)]
    with Engine(folder, slots=3) as engine:
        compact = intercept(engine, "compact")

        def fail(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
            raise MemoryError("none")

        compact.before = fail
        with answers(engine, [whole], expected[:1]):
            handle = submit(engine, half)
            with pytest.raises(BackendError, match=r"the backend failed .*MemoryError"):
                handle.result(WAIT)
        assert compact.calls
        compact.before = lambda inputs, outputs: None  # noqa: ARG005
        with answers(engine, [whole, half], expected):
            pass
        idle(engine)


def test_a_decode_that_fails_where_sums_of_attention_go_on(bundle: Callable[..., Path]) -> None:
    """No step is done again: layers whose sums have gone on would have them go on twice."""
    folder = bundle("digits-llava", *CACHED["h2o (cached)"], max_images=2)
    asks = [
        ask(max_new_tokens=20, ignore_eos=True, kv_keep=0.3),
        ask("Read the top row.", (1,), max_new_tokens=20, ignore_eos=True, kv_keep=0.3),
    ]
    with lvlm.load(folder) as model:
        expected = [one.alone(model) for one in asks]
    with Engine(folder, slots=2) as engine:
        decode, failures = intercept(engine, "decode"), iter([KeyError("odd")])
        asked = threading.Event()

        def after(inputs: Any, outputs: Any) -> None:  # noqa: ARG001
            if len(inputs["input_ids"]) == 2 and (error := next(failures, None)) is not None:
                raise error

        decode.before, decode.after = lambda *_: asked.wait(WAIT), after
        handles = [submit(engine, one) for one in asks]
        asked.set()
        for handle in handles:
            with pytest.raises(BackendError, match=r"the backend failed .*odd"):
                handle.result(WAIT)
        with answers(engine, asks, expected):
            pass
        idle(engine)


# Listeners, and the engine's own mistakes


def test_listeners_may_do_anything(engine: Engine, expected: list[Generation]) -> None:
    """Raise, cancel their own request or another one, ask for more."""
    more: list[Handle] = []
    with logged() as records, answers(engine, OTHERS, expected):
        own, other, third = (submit(engine, SHORT) for _ in range(3))

        def cancels() -> None:
            if len(own.token_ids) == 2:
                own.cancel()
                other.cancel()

        def raises() -> None:
            raise LookupError("a listener's")

        def asks() -> None:
            if third.done and not more:
                more.append(submit(engine, SHORT))

        own.subscribe(cancels)
        third.subscribe(raises)
        third.subscribe(asks)
        assert len(third.result(WAIT).token_ids) == 12
        until(lambda: bool(more))
        assert len(more[0].result(WAIT).token_ids) == 12
        for handle in (own, other):
            assert type(handle_error(handle)) is lvlm.core.errors.RequestCancelled
    assert {record.exc_info[0] for record in records if record.exc_info} == {LookupError}


def test_two_listeners_that_cancel_each_other(engine: Engine) -> None:
    """Neither waits for a lock that the other one holds."""
    for _ in range(20):
        first, second = submit(engine, SHORT), submit(engine, SHORT)
        first.subscribe(lambda a=first, b=second: a.done and b.cancel())  # type: ignore[misc]
        second.subscribe(lambda a=first, b=second: b.done and a.cancel())  # type: ignore[misc]
        threads = [threading.Thread(target=h.cancel) for h in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
            assert not thread.is_alive()


def test_a_mistake_of_the_engine_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever, and it is said aloud."""
    engine = Engine(folder, slots=1)
    monkeypatch.setattr(scheduler(engine).batch.slots, "start", None)
    all_asked = threading.Event()
    intercept(engine, "extend").before = lambda inputs, outputs: all_asked.wait(WAIT)  # noqa: ARG005
    with logged() as records:
        handles = [engine.submit(QUESTION) for _ in range(3)]
        all_asked.set()
        for handle in handles:
            with pytest.raises(
                BackendError, match=r"^the engine stopped \(TypeError: .*open it ag"
            ):
                handle.result(WAIT)
    assert [record.getMessage() for record in records] == ["the engine stopped"]
    with pytest.raises(EngineClosedError, match="this engine is closed"):
        engine.submit(QUESTION)
    engine.close()
