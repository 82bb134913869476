"""A GPU that is not there, for a test, bundles with engines for it, and a loaded model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_driver import FakeDriver
from fake_engines import RECIPES, Make, build_engines
from fake_onnxruntime import FakeOrt
from fake_tensorrt import FakeTensorRt
from settings import LIGHTVLM

import lvlm
from lvlm.core import nvidia
from lvlm.runtime.model import Model
from lvlm.runtime.sampling.sampler import Sampler


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setattr("lvlm.runtime.backends.trt.driver.open_driver", lambda: driver)
    return driver


@pytest.fixture
def trt(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    """TensorRT-RTX."""
    trt = FakeTensorRt(driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)  # type: ignore[arg-type]
    return trt


@pytest.fixture
def full(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    """TensorRT."""
    trt = FakeTensorRt(driver, rtx=False)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)  # type: ignore[arg-type]
    monkeypatch.delenv("LVLM_PLUGINS", raising=False)
    return trt


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> FakeOrt:
    """An ONNX Runtime with a GPU."""
    fake = FakeOrt()
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(nvidia, "copy_on_device", fake.copy)
    monkeypatch.setattr(nvidia, "clear_on_device", fake.clear)
    return fake


@pytest.fixture
def built(bundle: Make, tmp_path: Path) -> Make:
    """A bundle with engines: built("prefixkv", weights="inputs")."""

    def make(recipe: str = "none", dtype: str = "fp32", **options: Any) -> Path:
        source = bundle("digits-llava", *RECIPES[recipe], dtype=dtype, max_images=2)
        folder = tmp_path / "bundle"
        build_engines(source, folder, **options)
        return folder

    return make


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model never ends an answer by itself."""
    monkeypatch.setattr(Sampler, "choose", lambda self, logits: 20)  # noqa: ARG005


@pytest.fixture(scope="module")
def light(bundle: Callable[..., Path]) -> Iterator[Model]:
    """digits-llava with lightvlm."""
    with lvlm.load(bundle("digits-llava", *LIGHTVLM, max_images=2), threads=1) as model:
        yield model
