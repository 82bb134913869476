"""ONNX Runtime with a GPU that is not there, and a loaded model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_gpu import built, driver, full, trt
from fake_onnxruntime import FakeOrt
from settings import LIGHTVLM

import lvlm
from lvlm.core import nvidia
from lvlm.runtime.model import Model
from lvlm.runtime.sampling.sampler import Sampler

__all__ = ["built", "driver", "full", "trt"]  # fixtures of all of the runtime's tests


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> FakeOrt:
    """An ONNX Runtime with a GPU."""
    fake = FakeOrt()
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(nvidia, "copy_on_device", fake.copy)
    monkeypatch.setattr(nvidia, "clear_on_device", fake.clear)
    return fake


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model never ends an answer by itself."""
    monkeypatch.setattr(Sampler, "choose", lambda self, logits: 20)  # noqa: ARG005
    monkeypatch.setattr(Sampler, "take", lambda self, best: 20)  # noqa: ARG005


@pytest.fixture(scope="module")
def light(bundle: Callable[..., Path]) -> Iterator[Model]:
    """digits-llava with lightvlm."""
    with lvlm.load(bundle("digits-llava", *LIGHTVLM, max_images=2), threads=1) as model:
        yield model
