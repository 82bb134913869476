"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lvlm.runtime.backends import require
from lvlm.runtime.bundle import Graph
from lvlm.runtime.errors import BackendError


class Backend:
    """Host memory; buffers are numpy arrays, given to ONNX Runtime by address."""

    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        self.ort = require(
            "onnxruntime", "install lvlm-deploy[cpu] (or lvlm-deploy[cuda] on NVIDIA machines)"
        )
        self.threads = threads

    def load(self, folder: Path, graph: Graph) -> CpuSession:
        if any(port.dtype == "bfloat16" for port in (*graph.inputs, *graph.outputs)):
            raise BackendError(
                "this bundle is in bf16, which is for GPU targets; for the CPU export it with "
                "--dtype fp32 (or fp16)"
            )
        options = self.ort.SessionOptions()
        options.log_severity_level = 3
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            session = self.ort.InferenceSession(
                str(folder / graph.file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise BackendError(f"{graph.file} cannot be loaded on the CPU: {reason}") from None
        listed = ([p.name for p in graph.inputs], [p.name for p in graph.outputs])
        real = ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()])
        if listed != real:
            raise BackendError(f"{graph.file} has other inputs or outputs than the manifest lists")
        return CpuSession(session, real[1])

    def allocate(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.zeros(shape, dtype)


class CpuSession:
    def __init__(self, session: Any, outputs: list[str]) -> None:
        self.session, self.outputs = session, outputs

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> CpuCall:
        return CpuCall(self, inputs, outputs)


class CpuCall:
    """Buffers bound once; what changes is bound anew at each call."""

    def __init__(
        self,
        owner: CpuSession,
        inputs: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
    ) -> None:
        self.session = owner.session
        self.binding = owner.session.io_binding()
        self.lasting = (dict(inputs), dict(outputs))  # keeps the memory alive
        self.ignored = [name for name in owner.outputs if name not in outputs]
        for name, array in inputs.items():
            self._bind(self.binding.bind_input, name, array)
        for name, array in outputs.items():
            self._bind(self.binding.bind_output, name, array)

    def __call__(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        held = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        for name, array in held.items():
            self._bind(self.binding.bind_input, name, array)
        for name, array in outputs.items():
            self._bind(self.binding.bind_output, name, array)
        for name in self.ignored:
            if name not in outputs:
                self.binding.bind_output(name, "cpu")
        try:
            self.session.run_with_iobinding(self.binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {str(error).splitlines()[0]}") from None

    @staticmethod
    def _bind(bind: Any, name: str, array: np.ndarray) -> None:
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
