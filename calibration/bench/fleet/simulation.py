"""A fleet of replicas in simulated time: who gets a request, and when each piece of work ends."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b

from lvlm.bench.costs import MeasuredCosts
from lvlm.bench.fleet.arrivals import Arrival
from lvlm.bench.fleet.replica import Job, Piece, SimulatedReplica
from lvlm.bench.fleet.service_times import ServiceTimes
from lvlm.core.errors import ParameterError

# Which of the replicas a request is sent to; ``turn``: how many were before it.
Route = Callable[[Sequence[SimulatedReplica], Arrival, int], int]


def round_robin(replicas: Sequence[SimulatedReplica], _: Arrival, turn: int) -> int:
    """One after the other."""
    return turn % len(replicas)


def least_requests(replicas: Sequence[SimulatedReplica], _: Arrival, turn: int) -> int:
    """Whoever has the fewest; of several the next one in turn."""
    count = len(replicas)
    return min(range(count), key=lambda n: (replicas[n].requests, (n - turn) % count))


def by_image(replicas: Sequence[SimulatedReplica], asked: Arrival, turn: int) -> int:
    """The same one for the same image."""
    if asked.image is None:
        return least_requests(replicas, asked, turn)
    digest = blake2b(asked.image.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % len(replicas)


ROUTES: dict[str, Route] = {
    "round-robin": round_robin,
    "least-requests": least_requests,
    "image": by_image,
}


@dataclass(frozen=True)
class Fleet:
    """``per_machine`` replicas share a machine, and slow one another down as it was measured."""

    measured: MeasuredCosts
    replicas: int
    per_machine: int = 1
    queue_limit: int = 256
    route: str = "round-robin"

    def __post_init__(self) -> None:
        if self.per_machine > 1 and self.measured.beside is None:
            raise ParameterError(
                "these costs are those of one engine alone on its machine; measure them with "
                f"--copies {self.per_machine}"
            )


@dataclass(frozen=True)
class Ran:
    """All requests and what became of them; ``busy``: seconds that each replica worked."""

    jobs: Sequence[Job]
    busy: Sequence[float]


@dataclass
class _Doing:
    """A piece of work of a replica. ``left`` of 1 at the time ``since``; ``seconds``: of all of it
    at the present pace."""

    piece: Piece
    began: float
    since: float
    seconds: float
    left: float = 1.0


def simulate(fleet: Fleet, arrivals: Sequence[Arrival]) -> Ran:
    """Every arrival is answered or refused. Raises ParameterError where costs were not measured."""
    return _Simulation(fleet).run(arrivals)


@dataclass
class _Simulation:
    fleet: Fleet
    now: float = 0.0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    order: int = 0

    def __post_init__(self) -> None:
        measured = self.fleet.measured
        self.alone = ServiceTimes(measured.engine, measured.alone)
        self.beside = ServiceTimes(measured.engine, measured.beside or measured.alone)
        limit = self.fleet.queue_limit
        self.replicas = [
            SimulatedReplica(measured.engine, limit) for _ in range(self.fleet.replicas)
        ]
        self.doing: list[_Doing | None] = [None] * self.fleet.replicas
        self.busy = [0.0] * self.fleet.replicas

    def run(self, arrivals: Sequence[Arrival]) -> Ran:
        jobs = [Job(number, asked) for number, asked in enumerate(arrivals)]
        for job in jobs:
            self._at(job.asked.seconds, partial(self._arrive, job))
        while self.events:
            self.now, _, happen = heapq.heappop(self.events)
            happen()
        return Ran(jobs, self.busy)

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        self.order += 1
        heapq.heappush(self.events, (when, self.order, happen))

    def _arrive(self, job: Job) -> None:
        route = ROUTES[self.fleet.route]
        job.replica = number = route(self.replicas, job.asked, job.number)
        replica, prepare = self.replicas[number], self.alone.prepare
        if replica.full:
            job.refused = True
            return
        replica.preparing += 1
        doing = self.doing[number]
        if doing is not None:  # by another thread, on the same cores
            stolen = prepare / self.fleet.measured.engine.threads
            doing.left += stolen / doing.seconds
            self._resume(number)
        self._at(self.now + prepare, partial(self._enter, job))

    def _enter(self, job: Job) -> None:
        replica = self.replicas[job.replica]
        replica.preparing -= 1
        replica.waiting.append(job)
        if self.doing[job.replica] is None:
            self._begin(job.replica)

    def _begin(self, number: int) -> None:
        """The next piece of a replica, if there is any."""
        piece, before = self.replicas[number].begin(), self.doing[number]
        self.doing[number] = None
        if piece is not None:
            self.doing[number] = _Doing(piece, self.now, self.now, 1.0)
            self._resume(number)
        if (piece is None) != (before is None):  # its neighbours feel that
            for other in self._machine(number):
                if other != number and self.doing[other] is not None:
                    self._resume(other)

    def _resume(self, number: int) -> None:
        """Reckon anew when a piece ends, by who is busy beside it."""
        doing = self.doing[number]
        assert doing is not None
        doing.left -= (self.now - doing.since) / doing.seconds
        doing.since = self.now
        seconds = doing.piece.seconds(self.alone)
        others = [n for n in self._machine(number) if n != number and self.doing[n] is not None]
        if others:
            slower = doing.piece.seconds(self.beside) - seconds
            seconds += slower * len(others) / (self.fleet.measured.copies - 1)
        doing.seconds = seconds
        ends = self.now + max(0.0, doing.left) * seconds
        self._at(ends, partial(self._end, number, doing, doing.since, doing.left))

    def _end(self, number: int, doing: _Doing, since: float, left: float) -> None:
        """A piece has ended, unless it was reckoned anew since."""
        if self.doing[number] is not doing or (doing.since, doing.left) != (since, left):
            return
        took = self.now - doing.began
        self.busy[number] += took
        self.replicas[number].finish(doing.piece, self.now, took, self.alone)
        self._begin(number)

    def _machine(self, number: int) -> range:
        """The replicas that share its machine."""
        first = number - number % self.fleet.per_machine
        return range(first, min(first + self.fleet.per_machine, self.fleet.replicas))
