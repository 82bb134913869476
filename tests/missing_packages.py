"""Test modules that import a package which is not installed are skipped, and say which."""

from __future__ import annotations

from typing import Any

import pytest

# What the extras of pyproject.toml bring, by the names that are imported
OPTIONAL = {
    *("torch", "transformers", "safetensors", "onnx", "onnx_ir", "onnxscript", "onnxruntime"),
    *("openvino", "tensorrt", "tensorrt_rtx", "triton", "polygraphy", "av", "llguidance"),
    *("fastapi", "starlette", "uvicorn", "httpx", "openai", "prometheus_client", "matplotlib"),
}


class OptionalModule(pytest.Module):
    """A test module; skipped as a whole where a package of OPTIONAL is missing."""

    def _getobj(self) -> Any:
        try:
            return super()._getobj()
        except self.CollectError as error:
            cause = error.__cause__
            name = (getattr(cause, "name", None) or "").partition(".")[0]
            if not isinstance(cause, ModuleNotFoundError) or name not in OPTIONAL:
                raise
            pytest.skip(f"{name} is not installed", allow_module_level=True)
