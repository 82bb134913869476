"""Bundles and samples that tests of the evaluation share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from settings import CACHED

from lvlm.calibration.datasets.evaluation_samples import EvaluationSample, read_samples
from lvlm.calibration.evaluate.variants import Bundle


@pytest.fixture(scope="module")
def full(bundle: Callable[..., Path]) -> Bundle:
    return Bundle.read(bundle("tiny-llava", max_images=2), "full")


@pytest.fixture(scope="module")
def light(bundle: Callable[..., Path]) -> Bundle:
    return Bundle.read(bundle("tiny-llava", *CACHED["lightvlm (cached)"], max_images=2))


@pytest.fixture(scope="module")
def uniform(bundle: Callable[..., Path]) -> Bundle:
    return Bundle.read(bundle("tiny-llava", *CACHED["uniform (cached)"], max_images=2))


@pytest.fixture(scope="module")
def samples() -> list[EvaluationSample]:
    return read_samples("digits", samples=3, kinds=["describe", "row", "read"])
