"""ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

from lvlm.runtime.backends import require
from lvlm.runtime.backends._onnxruntime import OnnxRuntime, OrtSession
from lvlm.runtime.bundle import Manifest
from lvlm.runtime.errors import BackendError


class Backend(OnnxRuntime):
    """Host memory; buffers are numpy arrays."""

    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        ort = require(
            "onnxruntime", "install lvlm-deploy[cpu] (or lvlm-deploy[cuda] on NVIDIA machines)"
        )
        super().__init__(ort, ["CPUExecutionProvider"], threads)

    def load(self, folder: Path, manifest: Manifest, name: str) -> OrtSession:
        if manifest.dtype == "bfloat16":
            raise BackendError(
                "this bundle is in bf16, which is for GPU targets; for the CPU export it with "
                "--dtype fp32 (or fp16)"
            )
        return super().load(folder, manifest, name)
