"""The bundle that most tests ask, an engine of it, and answers of a model to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_tools import OTHERS, idle

import lvlm
from lvlm.runtime.engine import Engine
from lvlm.runtime.generate.answers import Generation


@pytest.fixture(scope="module")
def folder(bundle: Callable[..., Path]) -> Path:
    return bundle("digits-llava", max_images=2)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Generation]:
    """The answers to OTHERS."""
    with lvlm.load(folder) as model:
        return [a.alone(model) for a in OTHERS]


@pytest.fixture
def slots() -> int:
    """Of the engine; a file may have another number."""
    return 3


@pytest.fixture
def whole(folder: Path, slots: int) -> Iterator[Engine]:
    """An engine that reads prompts as a whole, as those of other recipes do."""
    with Engine(folder, slots=slots, chunk_tokens=0) as engine:
        yield engine
        idle(engine)


@pytest.fixture
def engine(folder: Path, slots: int) -> Iterator[Engine]:
    with Engine(folder, slots=slots) as engine:
        yield engine
        idle(engine)
