"""One generated input: what is run on it, and what is known beforehand about the outcome."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

COMMANDS = {
    "lvlm": "lvlm.main",
    "lvlm-run": "lvlm.runtime.run_cli",
    "lvlm-doctor": "lvlm.runtime.tools.doctor_cli",
    "lvlm-export": "lvlm.export.export_cli",
    "lvlm-build": "lvlm.plugins_trt.build_cli",
    "lvlm-eval": "lvlm.calibration.evaluate.eval_cli",
    "lvlm-calibrate": "lvlm.calibration.profile.calibrate_cli",
    "lvlm-bench": "lvlm.bench.bench_cli",
    "lvlm-fleet": "lvlm.bench.fleet.fleet_cli",
    "lvlm-tune": "lvlm.calibration.tune.tune_cli",
}
MESSAGE_LINES = 3


@dataclass(frozen=True)
class Case:
    """A command line, or a ``call`` of the Python interface.

    refused  it must be: the input is damaged, and said to be whole
    output   bundle folder that is absent or complete afterwards
    """

    program: str
    argv: tuple[str, ...] = ()
    call: Callable[[], object] | None = None
    refused: bool = False
    output: Path | None = None

    def run(self) -> int:
        """The exit status, as the installed command would have it."""
        if self.call is not None:
            from lvlm.core.console import run_main

            call = self.call

            def body() -> int:
                call()
                return 0

            return run_main(self.program, body)
        return int(import_module(COMMANDS[self.program]).main(list(self.argv)))

    def __str__(self) -> str:
        return " ".join([self.program, *map(repr, self.argv)])


@dataclass(frozen=True)
class Base:
    """What inputs are made from: a whole bundle, a whole checkpoint, images."""

    bundle: Path
    checkpoint: Path
    images: tuple[Path, ...]


class Generator(Protocol):
    """A module ``gen_NAME``.

    WEIGHT  of all inputs, this many parts are made by it
    WARM    modules imported before processes are forked
    """

    WEIGHT: int
    WARM: tuple[str, ...]

    def make(self, rng: random.Random, folder: Path, base: Base) -> Case:
        """The case, its files in ``folder``; what the command writes goes to ``folder/out``."""


def random_of(seed: int, generator: str, number: int) -> random.Random:
    return random.Random(f"{seed}:{generator}:{number}")
