"""A contender's child process, as its parent sees it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lvlm.bench.case_figures import RequestRecord, Round
from lvlm.bench.contenders import BenchError, Setup
from lvlm.bench.workload import RoundWorkload
from lvlm.core.typed_json import decode

if TYPE_CHECKING:
    from lvlm.bench.engine_costs import CostWork

POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
PATIENCE = 20  # seconds for a child to end by itself


class Child:
    """Lives until ``close``; between rounds it waits for the next command. It runs on ``cores``
    only, where they are given.

    Every method raises BenchError with one line about what went wrong in the child.
    """

    def __init__(
        self, label: str, log: Path, threads: int, cores: Collection[int] | None = None
    ) -> None:
        self.label, self._log = label, log
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lvlm.bench.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | dict.fromkeys(POOLS, str(threads)),
                text=True,
                encoding="utf-8",
            )
        if cores is not None:  # before it has begun any thread
            os.sched_setaffinity(self._process.pid, cores)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def open(self, setup: Setup) -> dict[str, Any]:
        """``load_s``, ``load_peak_bytes`` and ``facts``."""
        return self._ask({"do": "open", "setup": asdict(setup)})

    def round(self, work: RoundWorkload) -> Round:
        answer = self._ask({"do": "round", "work": asdict(work)})
        records = (decode(RequestRecord, record, "record") for record in answer["records"])
        return Round(tuple(records), answer["peak_bytes"])

    def costs(self, work: CostWork) -> dict[str, Any]:
        """``engine``, ``costs`` and ``peak_bytes``."""
        return self._ask({"do": "costs", "work": asdict(work)})

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchError(f"{self.label}: {self._end()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.label}: {answer['error']}")
        return answer

    def _end(self) -> str:
        """The reason why the process is no more."""
        status = self._process.wait(PATIENCE)
        lines = [x for x in self._log.read_text(errors="replace").splitlines() if x.strip()]
        last = f" (its last words: {lines[-1].strip()})" if lines else ""
        if status < 0:
            name = signal.Signals(-status).name
            hint = ", as when memory runs out" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{hint}{last}"
        return f"its process ended with status {status}{last}"

    def close(self) -> None:
        """Ends the process; it is killed if it does not end by itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
