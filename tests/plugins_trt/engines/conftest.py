"""A bundle with engines for a GPU that is not there, as the runtime's tests have it."""

from __future__ import annotations

from fake_gpu import built as with_engines
from fake_gpu import driver, trt

__all__ = ["driver", "trt", "with_engines"]
