"""What an engine holds after rounds of requests of all kinds; test_engine_memory.py runs this.

    PYTHONMALLOC=malloc GLIBC_TUNABLES=glibc.malloc.tcache_count=0 \
        python tests/runtime/engine/engine_growth.py BUNDLE ROUNDS IMAGE...

Prints, as JSON, of every round how many bytes are allocated and not free, of all libraries, how
many threads and open files there are, and of the last one how many tokens were reused. Resident
memory says less: it has free pages, and lacks those that nobody has written yet, as ONNX Runtime's
arena has until the longest prompt has come.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvlm.core.errors import CapacityError, LvlmError
from lvlm.runtime.engine import Engine, Handle

TURNS = 3
BESIDE = 2  # other requests beside each turn
SLOTS = 6  # all answers of a turn
LEFT: dict[str, Any] = {"max_new_tokens": 50, "ignore_eos": True}
NUMPY_KEEPS = (1024, 7)  # freed arrays: up to so many bytes, so many of each size


class Allocated(ctypes.Structure):
    """``struct mallinfo2``, whose numbers are of all arenas."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
            *("uordblks", "fordblks", "keepcost"),
        )
    )


class Rounds:
    """Requests of an engine, the same ones in every run; no text and no image comes twice."""

    def __init__(self, engine: Engine, images: Sequence[Path]) -> None:
        self.engine = engine
        self.images = [np.array(Image.open(path).convert("RGB")) for path in images]
        self.rng, self.numbers = random.Random(5), itertools.count(10**5)

    def image(self) -> np.ndarray:
        image = self.rng.choice(self.images).copy()
        image[:9, :9] = next(self.numbers) % 251
        image[:9, 9:18] = self.rng.randrange(256)
        return image

    def text(self, words: int) -> str:
        return f"{next(self.numbers)}" + " 7" * words

    def longest(self) -> None:
        """What needs most memory at once."""
        self.engine.generate(self.text(100), [self.image(), self.image()], max_new_tokens=30)
        handles = [self.plain(100, 2, 30) for _ in range(SLOTS)]
        for handle in handles:
            handle.result()

    def plain(self, words: int, images: int, tokens: int) -> Handle:
        shown = [self.image() for _ in range(images)]
        return self.engine.submit(self.text(words), shown, max_new_tokens=tokens)

    def drawn(self) -> Handle:
        draw = self.rng.randrange
        return self.plain(draw(80), draw(2), draw(1, 9))

    def run(self) -> None:
        """Conversations with images, in which 1 to 3 answers are drawn; beside them requests of
        mixed lengths, of which some have no answer."""
        talks: list[list[dict[str, Any]]] = [[], [], []]
        for turn in range(TURNS):
            beside = [self.drawn() for _ in range(BESIDE)]
            self.rng.choice(beside).cancel()
            beside.append(self.engine.submit(self.text(9), timeout=1e-9))
            with suppress(CapacityError):
                self.engine.submit(self.text(999))
            asked = []
            for n, talk in enumerate(talks, 1):
                talk.append({"role": "user", "content": self.content(turn, typed=n == 2)})
                asked.append(self.engine.submit(talk, n=n, temperature=0.5, max_new_tokens=7))
            left = self.engine.submit([*talks[0], {"role": "user", "content": "Well?"}], **LEFT)
            for talk, handle in zip(talks, asked, strict=True):
                talk.append({"role": "assistant", "content": handle.result().text})
            next(left.tokens())
            left.cancel()
            for handle in beside:
                with suppress(LvlmError):
                    handle.result()

    def content(self, turn: int, *, typed: bool) -> list[dict[str, Any]]:
        """An image in every second turn; ``typed``: with special tokens spelled out."""
        shown = [{"type": "image", "image": self.image()}] if turn % 2 == 0 else []
        text = self.text(self.rng.randrange(12)) + (" <image></s>" if typed else "")
        return [*shown, {"type": "text", "text": text}]


def settle(engine: Engine) -> None:
    """Wait until the engine's thread sleeps: it holds on to a request until it has told of it."""
    scheduler = engine._scheduler
    stats = engine.stats()
    while stats.running or stats.waiting or not scheduler._changed._waiters:  # type: ignore[attr-defined]
        time.sleep(0.001)
        stats = engine.stats()


def held(allocated: Callable[[], Allocated]) -> tuple[int, int, int]:
    """Bytes, threads, open files."""
    gc.collect()
    now = allocated()
    threads, files = (len(os.listdir(f"/proc/self/{what}")) for what in ("task", "fd"))
    return now.uordblks + now.hblkhd, threads, files


def main(folder: str, rounds: str, *images: str) -> None:
    allocated = ctypes.CDLL(None).mallinfo2
    allocated.restype = Allocated
    # At once what else comes a size at a time
    [[np.empty(size, np.uint8) for _ in range(NUMPY_KEEPS[1])] for size in range(NUMPY_KEEPS[0])]
    with Engine(folder, threads=1, slots=SLOTS, max_text_len=256, image_cache="100kB") as engine:
        asked, seen = Rounds(engine, [Path(image) for image in images]), []
        asked.longest()
        for _ in range(int(rounds)):
            asked.run()
            settle(engine)
            seen.append(held(allocated))
        reused = engine.stats().reused_tokens
    print(json.dumps([seen, reused]))


if __name__ == "__main__":
    main(*sys.argv[1:])
