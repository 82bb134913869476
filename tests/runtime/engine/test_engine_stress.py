"""Random operations from several threads, with faults; longer with --stress-steps."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_tools import IMAGES, WAIT, ask, idle, intercept, same
from settings import CACHED

import lvlm
from lvlm.core.errors import (
    BackendError,
    LvlmError,
    QueueFullError,
    RequestCancelled,
    RequestTimeout,
)
from lvlm.runtime.engine import Engine, Handle

PROMPTS = ("Hi", "Describe the picture.", "Read the top row.")
TWO: dict[str, Any] = {"n": 2, "temperature": 0.9, "seed": 5}
USERS = 3


@pytest.mark.parametrize("recipe", ["none", "lightvlm (cached)"])
def test_random_operations(recipe: str, bundle: Callable[..., Path], stress_steps: int) -> None:
    """Every answer is the one that is due, or the error that was provoked; nothing is left over."""
    folder = bundle("tiny-llava", *CACHED.get(recipe, (recipe,)), max_images=2)
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
        if any(known in str(error) for known in ("provoked", "logits contain NaN or infinity")):
            return
        raise
    same(answer, expected[which])


def test_two_hundred_at_once_on_two_slots(bundle: Callable[..., Path]) -> None:
    folder = bundle("tiny-llava", max_images=2)
    with Engine(folder, slots=2) as engine:
        handles = [engine.submit(PROMPTS[i % 3], max_new_tokens=1 + i % 4) for i in range(200)]
        assert all(len(h.result(WAIT).token_ids) <= 1 + i % 4 for i, h in enumerate(handles))
        times = [handle.token_times[0] for handle in handles]
        assert times == sorted(times)
        idle(engine)
