"""Random operations from several threads or tasks, with faults; longer with --stress-steps."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_tools import IMAGES, WAIT, ask, idle, intercept, same, scheduler, until
from settings import CACHED, LIGHTVLM

import lvlm
from lvlm.core.errors import (
    BackendError,
    LvlmError,
    QueueFullError,
    RequestCancelled,
    RequestTimeout,
)
from lvlm.runtime.engine import Engine, Handle
from lvlm.runtime.engine.aio import AsyncEngine
from lvlm.runtime.engine.request import Request
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.model import Model

PROMPTS = ("Hi", "Describe the picture.", "Read the top row.")
TWO: dict[str, Any] = {"n": 2, "temperature": 0.9, "seed": 5}
USERS = 3


@pytest.mark.parametrize("recipe", ["none", "lightvlm (cached)"])
def test_random_operations(recipe: str, bundle: Callable[..., Path], stress_steps: int) -> None:
    """Every answer is the one that is due, or the error that was provoked; nothing is left over."""
    folder = bundle("digits-llava", *CACHED.get(recipe, (recipe,)), max_images=2)
    kinds = [
        ask(prompt, images, max_new_tokens=n, ignore_eos=n > 5, **ratio, **(TWO if n == 4 else {}))
        for prompt in PROMPTS
        for images in ((), (0,), (1, 0))
        for n in (1, 4, 18)
        for ratio in ({}, {"kv_keep": 0.4})[: 1 if recipe == "none" else 2]
    ]
    rng = random.Random(11)
    kinds = rng.sample(kinds, 12)
    with lvlm.load(folder) as model:
        expected = [kind.alone(model) for kind in kinds]
    wrong: list[BaseException] = []
    with Engine(folder, slots=3, queue_limit=8, image_cache="50kB") as engine:
        faults = random.Random(13)  # the engine's threads draw from it
        reads = "extend" if recipe == "none" else "prefill"
        for graph in ("vision", reads, "decode"):
            intercept(engine, graph).before = lambda inputs, outputs: _sometimes(faults)  # noqa: ARG005
        intercept(engine, reads).after = lambda inputs, outputs: _spoil(faults, outputs)  # noqa: ARG005

        def user(number: int) -> None:
            own = random.Random(number)
            held: list[tuple[int, Handle]] = []
            try:
                for _ in range(stress_steps // USERS):
                    _operate(engine, own, kinds, held)
                    if held and own.random() < 0.5:
                        _check(*held.pop(own.randrange(len(held))), expected)
                for which, handle in held:
                    _check(which, handle, expected)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=user, args=(n,)) for n in range(USERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        idle(engine)
        assert engine.images.bytes <= 50_000


def _operate(engine: Engine, rng: random.Random, kinds: Any, held: list[Any]) -> None:
    """Ask, with or without a timeout; cancel."""
    draw = rng.random()
    if draw < 0.75:
        which = rng.randrange(len(kinds))
        timeout = rng.choice([None, None, None, 0.02, 1e-9])
        try:
            handle = engine.submit(*kinds[which].arguments, timeout=timeout, **kinds[which].options)
        except QueueFullError:
            return
        held.append((which, handle))
    elif held and draw < 0.9:
        handle = rng.choice(held)[1]
        rng.choice([handle, *handle.others]).cancel()
    elif draw < 0.95:
        with pytest.raises(LvlmError):
            engine.submit("x " * 9999, IMAGES)


def _sometimes(rng: random.Random) -> None:
    if rng.random() < 0.01:
        raise OSError("provoked")


def _spoil(rng: random.Random, outputs: Any) -> None:
    if rng.random() < 0.03:
        outputs["logits"][:] = np.inf


def _check(which: int, handle: Handle, expected: list[Any]) -> None:
    try:
        answer = handle.result(WAIT)
    except (RequestCancelled, RequestTimeout):
        return
    except BackendError as error:
        _provoked(error)
        return
    same(answer, expected[which])


def _provoked(error: BackendError) -> None:
    """Raises what nobody provoked."""
    if not any(known in str(error) for known in ("provoked", "logits contain NaN or infinity")):
        raise error


# Conversations, on an event loop


@dataclass(frozen=True)
class Talk:
    """What a user says and shows in each turn, and what is due."""

    said: list[list[dict[str, Any]]]
    options: dict[str, Any]
    due: list[Generation]

    @classmethod
    def of(cls, model: Model, said: list[list[dict[str, Any]]], **options: Any) -> Talk:
        talk = cls(said, {"max_new_tokens": 8} | options, [])
        for turn in range(len(said)):
            talk.due.append(model.generate(talk.messages(turn), **talk.options))
        return talk

    def messages(self, turn: int) -> list[dict[str, Any]]:
        before = [
            message
            for content, answer in zip(self.said[:turn], self.due, strict=False)
            for message in (
                {"role": "user", "content": content},
                {"role": "assistant", "content": answer.text},
            )
        ]
        return [*before, {"role": "user", "content": self.said[turn]}]


def _part(shown: Path | str) -> dict[str, Any]:
    kind = "text" if isinstance(shown, str) else "image"
    return {"type": kind, kind: shown}


def _talks(model: Model) -> list[Talk]:
    first, second = IMAGES
    said = [
        [[first, "Describe the picture."], ["And the top row?"], ["And this?", second]],
        [["Hi </s>"], [second, "Read the top row.", first], ["Which is it? <image>"]],
    ]
    parts = [[[_part(one) for one in turn] for turn in talk] for talk in said]
    return [Talk.of(model, parts[0]), Talk.of(model, parts[1], **TWO)]


@pytest.mark.parametrize("recipe", [("none",), LIGHTVLM], ids=["none", "lightvlm"])
def test_conversations_among_faults(
    recipe: tuple[str, ...], bundle: Callable[..., Path], stress_steps: int
) -> None:
    """A turn that was cancelled, out of time or lost is asked again and answered as if nothing had
    been; no row, no request and nothing wrong in the cache is left."""
    folder = bundle("digits-llava", *recipe, max_images=2)
    with lvlm.load(folder) as model:
        talks = _talks(model)
    with Engine(folder, slots=3, image_cache="50kB") as engine:
        faults = random.Random(17)
        reads = "extend" if recipe == ("none",) else "prefill"
        read = intercept(engine, reads)
        read.before = lambda inputs, outputs: _ruin(faults, engine)  # noqa: ARG005
        read.after = lambda inputs, outputs: _spoil(faults, outputs)  # noqa: ARG005
        for graph in ("vision", "decode"):
            intercept(engine, graph).before = lambda inputs, outputs: _sometimes(faults)  # noqa: ARG005

        async def user(number: int) -> int:
            rng, answered = random.Random(number), 0
            for _ in range(stress_steps // (2 * USERS)):
                talk = talks[(number + answered // 3) % len(talks)]
                answered += await _turn(AsyncEngine(engine), rng, talk, answered % 3)
            return answered

        async def users() -> list[int]:
            return await asyncio.gather(*(user(number) for number in range(USERS)))

        assert all(asyncio.run(users()))
        idle(engine)
        until(lambda: not _requests())
        cache = scheduler(engine).batch.cache
        assert all(np.isfinite(buffer).all() for buffer in cache.buffers.values())
        faults.random = lambda: 1.0  # type: ignore[method-assign]
        for talk in talks:
            same(engine.generate(talk.messages(2), **talk.options), talk.due[2])


async def _turn(engine: AsyncEngine, rng: random.Random, talk: Talk, turn: int) -> bool:
    """Ask, and wait as long as one likes; whether the answer came."""
    timeout, patience = rng.choice([None, None, 0.02, 1e-9]), rng.choice([None, None, 0.03])
    try:
        async with asyncio.timeout(patience):
            handle = await engine.submit(talk.messages(turn), timeout=timeout, **talk.options)
            answer = await handle
    except (RequestCancelled, TimeoutError):  # RequestTimeout is one, too
        return False
    except BackendError as error:
        _provoked(error)
        return False
    same(answer, talk.due[turn])
    return True


def _ruin(rng: random.Random, engine: Engine) -> None:
    """A graph that fails after it has written something."""
    if rng.random() < 0.12:
        batch = scheduler(engine).batch
        for buffer in batch.cache.buffers.values():
            buffer[batch.slots.filling.start] = np.nan
        raise OSError("provoked")


def _requests() -> list[Request]:
    """Those that somebody holds."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Request]


def test_two_hundred_at_once_on_two_slots(bundle: Callable[..., Path]) -> None:
    folder = bundle("digits-llava", max_images=2)
    with Engine(folder, slots=2) as engine:
        handles = [engine.submit(PROMPTS[i % 3], max_new_tokens=1 + i % 4) for i in range(200)]
        assert all(len(h.result(WAIT).token_ids) <= 1 + i % 4 for i, h in enumerate(handles))
        times = [handle.token_times[0] for handle in handles]
        assert times == sorted(times)
        idle(engine)
