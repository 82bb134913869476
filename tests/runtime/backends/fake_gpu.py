"""Fixtures of a GPU that is not there: its driver, TensorRT, bundles with engines for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from fake_driver import FakeDriver
from fake_engines import RECIPES, Make, build_engines
from fake_tensorrt import FakeTensorRt


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
def built(bundle: Make, tmp_path: Path) -> Make:
    """A bundle with engines: built("prefixkv", weights="inputs")."""

    def make(recipe: str = "none", dtype: str = "fp32", **options: Any) -> Path:
        source = bundle("digits-llava", *RECIPES[recipe], dtype=dtype, max_images=2)
        folder = tmp_path / "bundle"
        build_engines(source, folder, **options)
        return folder

    return make
