"""Weights that are inputs of engines: which bytes of a file arrive, and that each comes once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_driver import FakeDriver

from lvlm.core.errors import BackendError
from lvlm.runtime.backends.trt import engine_weights
from lvlm.runtime.backends.trt.engine_weights import Weights
from lvlm.runtime.bundle.engine_sets import EngineWeight

START = 4096
MATRIX = np.arange(6 * 10, dtype=np.uint16).reshape(6, 10)
WHOLE = EngineWeight("w", "weights.bin", START, MATRIX.nbytes, "float16", (6, 10))


def part(first: int, stop: int) -> EngineWeight:
    dims = (6, stop - first)
    return EngineWeight(
        f"w[{first}:{stop}]", "weights.bin", START, MATRIX.nbytes, "float16", dims, (first, stop)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights.bin").write_bytes(b"\xff" * START + MATRIX.tobytes() + b"\xff" * 7)
    return tmp_path


@pytest.mark.parametrize("chunk", [12, 21, 1 << 20])
def test_columns_are_taken_from_where_the_whole_lies(
    chunk: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_weights, "CHUNK", chunk)
    driver = FakeDriver()
    weights = Weights(driver)
    asked = [part(0, 4), WHOLE, part(4, 5), part(5, 10)]
    there = weights.of(folder, asked)
    for weight in asked:
        array = there[weight.name]
        assert array.shape == weight.dims
        assert array.address % 256 == 0
        found = driver.memory(array.address, weight.nbytes).view(np.uint16).reshape(weight.dims)
        np.testing.assert_array_equal(found, MATRIX[:, slice(*(weight.columns or (0, 10)))])
    sent = sum(event[1] for event in driver.events if event[0] == "upload")
    assert sent == 2 * MATRIX.nbytes
    again = weights.of(folder, [part(4, 5)])  # of another engine
    assert again[part(4, 5).name] == there[part(4, 5).name]
    assert sum(event[1] for event in driver.events if event[0] == "upload") == sent


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {"columns": (6, 11)},  # noqa: ARG005
        lambda w: {"columns": (-1, 4)},  # noqa: ARG005
        lambda w: {"columns": (0, 4)},  # noqa: ARG005
        lambda w: {"columns": (0, 5, 10)},  # noqa: ARG005
        lambda w: {"dims": (7, *w.dims[1:])},
        lambda w: {"dims": (-6, -5)},  # noqa: ARG005
        lambda w: {"dims": (0, 5)},  # noqa: ARG005
        lambda w: {"dims": w.dims[:1]},
        lambda w: {"dtype": "int4"},  # noqa: ARG005
        lambda w: {"offset": w.offset + 100},
    ],
)
def test_columns_that_are_not_there(
    change: Callable[[EngineWeight], dict[str, object]], folder: Path
) -> None:
    weight = part(5, 10)
    fields = {**vars(weight), **change(weight)}
    with pytest.raises(BackendError, match=r"has no w\[5:10\] where engine\.json says; build the"):
        Weights(FakeDriver()).of(folder, [EngineWeight(**fields)])


def test_pages_are_given_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight's, once all of its parts are on the device."""
    driver, dropped = FakeDriver(), []

    def drop(file: int, start: int, size: int, advice: int) -> None:
        assert os.fstat(file).st_size == (folder / "weights.bin").stat().st_size
        assert advice == os.POSIX_FADV_DONTNEED
        dropped.append((start, size, driver.kinds().count("upload")))

    monkeypatch.setattr(os, "posix_fadvise", drop)
    second = EngineWeight("x", "weights.bin", 0, 8, "float16", (2, 2))
    Weights(driver).of(folder, [part(0, 4), part(4, 10), second])
    assert dropped == [(START, MATRIX.nbytes, 2), (0, 8, 3)]
