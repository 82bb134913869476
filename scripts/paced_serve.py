"""lvlm-serve whose engine takes as long as a file of costs says: for check_fleet.py --paced.

    python scripts/paced_serve.py costs.json NAME model=tiny/ --port 8000

A small bundle is slowed down by sleeping after each image, piece of a prompt and decode step, until
it has taken what lvlm-bench --costs measured of another one. All else is the server's own: HTTP,
queue, slots, the order of work. So the simulation's idea of these can be held against it on a
machine that others use, too, which a sleep does not mind.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lvlm.bench.costs import read_costs
from lvlm.bench.fleet.service_times import ServiceTimes
from lvlm.main import run_verb
from lvlm.runtime.engine.steps import Steps
from lvlm.runtime.generate.loaded_graphs import Graphs


def main() -> int:
    file, name, *words = sys.argv[1:]
    measured = read_costs(Path(file), name)
    slow_down(ServiceTimes(measured.engine, measured.alone))
    return run_verb("serve", words)


def slow_down(times: ServiceTimes) -> None:
    """Let every engine of this process take these times at least."""

    def paced(kind: Any, name: str, seconds: Callable[..., float]) -> None:
        own = getattr(kind, name)

        def slower(*args: Any) -> Any:
            with lasting(seconds(*args)):
                return own(*args)

        setattr(kind, name, slower)

    def whole(_: Graphs, prompts: Any, *rest: Any) -> float:  # noqa: ARG001
        return sum(times.whole(len(p.ids), len(p.images)) for p in prompts)

    def step(steps: Steps) -> float:
        running = steps.slots.running
        tokens = sum(len(r.prompt.ids) + len(r.row.tokens) for r in running)
        return times.step(len(running), tokens / len(running))

    paced(Graphs, "tokens", lambda _, images: times.image(len(images)))
    paced(Graphs, "extend", lambda _, __, span, *rest: times.chunk(len(span), span.start))  # noqa: ARG005
    paced(Graphs, "prefill", whole)
    paced(Steps, "run", step)


@contextmanager
def lasting(seconds: float) -> Iterator[None]:
    """Until so many seconds have passed."""
    until = time.perf_counter() + seconds
    yield
    time.sleep(max(0.0, until - time.perf_counter()))


if __name__ == "__main__":
    sys.exit(main())
