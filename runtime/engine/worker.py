"""Worker that reads prompts: on a thread of its own, or where the backend cannot, at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Protocol, TypeVar

T = TypeVar("T")


class Worker(Protocol):
    def submit(self, compute: Callable[[], T], done: Callable[[], None]) -> Future[T]:
        """A future of what ``compute`` returns or raises; ``done`` is called when the future has
        it."""

    def close(self) -> None:
        """Take no more, and wait for what is being computed."""


class Inline:
    """Computes on the thread that asks."""

    def submit(self, compute: Callable[[], T], done: Callable[[], None]) -> Future[T]:
        future: Future[T] = Future()
        _run(future, compute, done)
        return future

    def close(self) -> None:
        """Nothing is left to wait for."""


class Beside:
    """Computes on a second thread, one after the other.

    Not a ThreadPoolExecutor, which takes no more work as soon as the interpreter begins to exit,
    while the engine's thread still runs.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()

    def submit(self, compute: Callable[[], T], done: Callable[[], None]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put(lambda: _run(future, compute, done))
        return future

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()


def _work(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # what it holds is not kept until the next one comes


def _run(future: Future[T], compute: Callable[[], T], done: Callable[[], None]) -> None:
    try:
        future.set_result(compute())
    except Exception as error:
        future.set_exception(error)
    done()
