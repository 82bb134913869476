"""What the engine's tests have in common: requests, their answers alone, faults at chosen calls."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from settings import ASSETS

from lvlm.runtime.engine import Engine, Handle
from lvlm.runtime.engine.scheduler import Scheduler
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.model import Model

IMAGES = [ASSETS / f"samples/digits-{i}.png" for i in (1, 2)]
QUESTION = "Describe the picture."
LONG: dict[str, Any] = {"max_new_tokens": 1000, "ignore_eos": True}
WAIT = 60.0  # seconds after which a test has failed rather than waits


@dataclass(frozen=True)
class Ask:
    """A request: a prompt, the numbers of its images, options of generate."""

    prompt: str = QUESTION
    images: tuple[int, ...] = (0,)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[str, list[Path]]:
        return self.prompt, [IMAGES[i] for i in self.images]

    def alone(self, model: Model) -> Generation:
        return model.generate(*self.arguments, **self.options)


def ask(prompt: str = QUESTION, images: tuple[int, ...] = (0,), **options: Any) -> Ask:
    return Ask(prompt, images, {"max_new_tokens": 6} | options)


SHORT = ask("Hi", (), max_new_tokens=12, ignore_eos=True)  # positions below 100: no image
OTHERS = [  # what is asked beside it
    ask(max_new_tokens=25, ignore_eos=True),
    ask("Read the top row.", (1,), max_new_tokens=25, ignore_eos=True),
]


def submit(engine: Engine, a: Ask) -> Handle:
    return engine.submit(*a.arguments, **a.options)


def short_row(inputs: Any) -> np.ndarray:
    """Which rows of a decode are SHORT's."""
    rows: np.ndarray = inputs["position_ids"][:, 0] < 100
    return rows


def same_images(ours: Generation, theirs: Generation) -> None:
    """What is told of the images is equal, and of the prompt's tokens."""
    np.testing.assert_equal(ours.merge_maps, theirs.merge_maps)
    np.testing.assert_equal(ours.images, theirs.images)


def same(ours: Generation, theirs: Generation) -> None:
    """Equal answers, whatever else was run beside them."""
    assert ours.token_ids == theirs.token_ids
    assert ours.text == theirs.text
    assert ours.finish_reason == theirs.finish_reason
    assert ours.stats.kept_per_layer == theirs.stats.kept_per_layer
    assert ours.stats.tokens_per_layer == theirs.stats.tokens_per_layer
    assert len(ours.scores) == len(theirs.scores)
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        np.testing.assert_allclose(mine.logprob, other.logprob, atol=1e-3)
        assert len(mine.top) == len(other.top)
        np.testing.assert_allclose([p for _, p in mine.top], [p for _, p in other.top], atol=1e-3)
    for answer, alone in zip(ours.others, theirs.others, strict=True):
        same(answer, alone)


def scheduler(engine: Engine) -> Scheduler:
    return engine._scheduler


def until(true: Callable[[], bool]) -> None:
    """Wait until it is so."""
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def idle(engine: Engine) -> None:
    """Nothing runs, waits or is being filled, and every row has one use."""
    inside = scheduler(engine)
    until(lambda: not (inside.waiting or inside.batch.slots.running or inside._prefilling))
    inside.batch.slots.check()
    assert not inside.batch.slots.filling
    assert inside._thread.is_alive()


class Faulty:
    """A session whose calls pass ``before`` and ``after`` (inputs, outputs), which may raise,
    wait, or change them."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.gated = getattr(session, "gated", 0)
        self.before: Callable[[Any, Any], None] = lambda inputs, outputs: None  # noqa: ARG005
        self.after = self.before
        self.calls = 0

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Any:
        call = self.session.bind(inputs, outputs)
        return _FaultyCall(self, call)


@dataclass(frozen=True)
class _FaultyCall:
    owner: Faulty
    call: Any

    def __call__(self, inputs: Any, outputs: Any) -> None:
        self.owner.calls += 1
        self.owner.before(inputs, outputs)
        self.call(inputs, outputs)
        self.owner.after(inputs, outputs)

    def stop(self) -> None:
        self.call.stop()


@contextmanager
def logged() -> Iterator[list[logging.LogRecord]]:
    """What lvlm logs meanwhile, which goes nowhere else."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("lvlm")
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def intercept(who: Engine | Model, name: str) -> Faulty:
    """Stand between an engine or a model and one of its graphs. Before the first request."""
    sessions = (who.graphs if isinstance(who, Model) else scheduler(who).batch.graphs).sessions
    faulty = Faulty(sessions[name])
    sessions[name] = faulty
    return faulty


class Held:
    """A graph that waits to be let go. ``reached`` is set when it has been called."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        intercept(engine, name).before = self.hold

    def hold(self, inputs: Any, outputs: Any) -> None:  # noqa: ARG002
        self.reached.set()
        assert self.go.wait(WAIT)


@contextmanager
def answers(engine: Engine, asks: Sequence[Ask], expected: Sequence[Generation]) -> Iterator[None]:
    """What is asked beside the body, and answered as if it were alone."""
    handles = [submit(engine, a) for a in asks]
    yield
    for handle, one in zip(handles, expected, strict=True):
        same(handle.result(WAIT), one)


def running(engine: Engine, **options: Any) -> Handle:
    """A request that has a token."""
    handle = engine.submit(QUESTION, IMAGES[:1], **(LONG | options))
    next(handle.tokens())
    return handle
