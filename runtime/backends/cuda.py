"""ONNX Runtime on an NVIDIA GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from lvlm.runtime.backends import Buffer, host_dtype, require
from lvlm.runtime.backends._onnxruntime import OnnxRuntime, failure
from lvlm.runtime.errors import BackendError

CUDA = "CUDAExecutionProvider"
PACKAGE = "pip uninstall -y onnxruntime, then pip install 'lvlm-deploy[cuda]'"


class Backend(OnnxRuntime):
    """Buffers are OrtValues on the GPU; ONNX Runtime copies what lies on the host."""

    name = "cuda"
    device = "cuda"

    def __init__(self, threads: int | None = None) -> None:
        ort = require("onnxruntime", "pip install 'lvlm-deploy[cuda]'")
        available = ort.get_available_providers()
        if CUDA not in available:
            raise BackendError(
                f"the installed onnxruntime has no {CUDA}, only {', '.join(available)}; {PACKAGE}"
            )
        ort.preload_dlls()  # CUDA and cuDNN where pip put them
        # Shapes are computed on the CPU, and ops that have no CUDA kernel.
        super().__init__(ort, [CUDA, "CPUExecutionProvider"], threads)

    def check_started(self, providers: list[str]) -> None:
        if providers[0] != self.providers[0]:
            raise BackendError(
                f"{self.providers[0]} did not start, so ONNX Runtime would use {providers[0]}; "
                "check the driver with nvidia-smi, and pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        zeros: Any = np.zeros(shape, host_dtype(dtype))
        try:
            return self.ort.OrtValue.ortvalue_from_numpy(zeros, self.device, 0)
        except Exception as error:
            raise failure(error, "a buffer cannot be allocated") from None
