"""Sending the requests of a round, to a contender that answers one at a time or many at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from lvlm.bench.case_figures import RequestRecord
from lvlm.bench.workload import RoundWorkload, WorkloadRequest


class Pending(Protocol):
    """A request that was taken: ``wait`` until it is answered. ``token_times``: perf_counter()."""

    def wait(self) -> tuple[Sequence[float], int, int | None]:
        """(time of each token, prompt tokens, cache bytes or None)"""
        ...


class Mark(Protocol):
    """A token arrived; ``at``: since then, on perf_counter's clock."""

    def __call__(self, at: float | None = None) -> None: ...


# Answers a request; marks each token. (prompt tokens, cache bytes)
Answer = Callable[[WorkloadRequest, Mark], tuple[int, int | None]]


def one_after_another(answer: Answer, work: RoundWorkload) -> list[RequestRecord]:
    """Drive a contender that answers one request at a time: the others queue, first come first
    served, and their waiting counts."""
    began, records, ends = time.perf_counter(), list[RequestRecord](), list[float]()
    for index, request in enumerate(work.requests):
        if work.arrivals:
            arrival = work.arrivals[index]
            time.sleep(max(0.0, began + arrival - time.perf_counter()))
        else:  # a client asks when the answer to its last question is there
            behind = index - work.concurrency
            arrival = ends[behind] if behind >= 0 else 0.0
        times: list[float] = []

        def mark(at: float | None = None, times: list[float] = times) -> None:
            times.append(time.perf_counter() if at is None else at)

        tokens, cache = answer(request, mark)
        ends.append(time.perf_counter() - began)
        records.append(RequestRecord(arrival, tuple(t - began for t in times), tokens, cache))
    return records


def at_once(
    submit: Callable[[WorkloadRequest], Pending], work: RoundWorkload
) -> list[RequestRecord]:
    """Drive a contender that takes requests while it answers others; ``submit`` is called from many
    threads. The first error of any request is raised."""
    began = time.perf_counter()
    records: list[RequestRecord | None] = [None] * len(work.requests)
    errors: list[BaseException] = []

    def ask(index: int, arrival: float) -> None:
        try:
            times, tokens, cache = submit(work.requests[index]).wait()
        except BaseException as error:
            errors.append(error)
            return
        records[index] = RequestRecord(arrival, tuple(t - began for t in times), tokens, cache)

    threads = _by_themselves(ask, work, began) if work.arrivals else _clients(ask, work, began)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [record for record in records if record is not None]


def _clients(
    ask: Callable[[int, float], None], work: RoundWorkload, began: float
) -> list[threading.Thread]:
    """Clients that take the next request when they have their answer."""
    indices, lock = iter(range(len(work.requests))), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                index = next(indices, None)
            if index is None:
                return
            ask(index, time.perf_counter() - began)

    return _started([client] * min(work.concurrency, len(work.requests)))


def _by_themselves(
    ask: Callable[[int, float], None], work: RoundWorkload, began: float
) -> list[threading.Thread]:
    """A thread per request, which sleeps until its arrival."""

    def wait_for(index: int) -> Callable[[], None]:
        def arrive() -> None:
            time.sleep(max(0.0, began + work.arrivals[index] - time.perf_counter()))
            ask(index, work.arrivals[index])

        return arrive

    return _started([wait_for(index) for index in range(len(work.requests))])


def _started(bodies: Sequence[Callable[[], None]]) -> list[threading.Thread]:
    threads = [threading.Thread(target=body, daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    return threads
