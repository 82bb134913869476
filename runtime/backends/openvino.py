"""OpenVINO on the CPU, on graphs lowered for it.

Those give the new cache entries, which are stored here; OpenVINO reads the buffers where they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lvlm.core.errors import BackendError, ParameterError
from lvlm.core.installing import install, require
from lvlm.runtime.backends.host.buffers import HostMemory, failure
from lvlm.runtime.bundle.manifest import Graph, Manifest

SLOTS = "cache_slots"  # output [writes,B]: where the entries of each present output go
PRECISION = "LVLM_OPENVINO_PRECISION"
# What is computed in -> what OpenVINO must list among the CPU's capabilities
PRECISIONS = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}


class Backend(HostMemory):
    """Host memory; buffers are numpy arrays. Computes in fp32 unless LVLM_OPENVINO_PRECISION says
    otherwise: OpenVINO's own choice is bf16 where the CPU has it, and then answers may differ from
    those of device cpu."""

    name = "openvino"
    static_capacity = False

    def __init__(self, threads: int | None = None) -> None:
        self.ov = require("openvino", install("openvino"))
        self.core = self.ov.Core()
        self.options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self._precision(),
            # Two processes would be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
            # Quantised weights alone; activations stay what they are.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        if threads is not None:
            self.options["INFERENCE_NUM_THREADS"] = threads

    def _precision(self) -> str:
        wanted = os.environ.get(PRECISION, "f32")
        if wanted not in PRECISIONS:
            raise ParameterError(f"{PRECISION} is {wanted!r}; give {', '.join(PRECISIONS)}")
        able = self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if PRECISIONS[wanted] not in able:
            raise BackendError(f"this CPU does not compute in {wanted}; unset {PRECISION}")
        return wanted

    def load(self, folder: Path, manifest: Manifest, name: str) -> OpenVinoSession:
        graph = manifest.graphs[name]
        lowered = folder / f"{Path(graph.file).stem}.{self.name}.onnx"
        if lowered.name not in manifest.files:
            raise BackendError(
                f"{folder} has no {lowered.name}; make it with lvlm-build engine {folder} --target "
                f"{self.name}"
            )
        try:
            model = self.core.read_model(lowered)
            compiled = self.core.compile_model(model, "CPU", self.options)
        except (RuntimeError, MemoryError) as error:
            raise failure(error, f"OpenVINO cannot load {lowered}", _reason(error)) from None
        _check_ports(lowered, graph, compiled)
        return OpenVinoSession(self.ov, graph, compiled)


class OpenVinoSession:
    """A compiled graph."""

    def __init__(self, ov: Any, graph: Graph, compiled: Any) -> None:
        self.ov, self.compiled = ov, compiled
        self.takes = _names(compiled.inputs)
        self.presents = [p.name for p in graph.outputs if p.name.startswith("present_")]

    def bind(
        self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
    ) -> OpenVinoCall:
        return OpenVinoCall(self, inputs, outputs)

    def tensor(self, array: np.ndarray) -> Any:
        """The same memory. numpy has no bf16, whose bits travel as uint16."""
        if array.dtype == np.uint16:
            return self.ov.Tensor(array, array.shape, self.ov.Type.bf16)
        return self.ov.Tensor(array, shared_memory=True)


class OpenVinoCall:
    """Buffers bound once; what changes is bound anew at each call."""

    def __init__(
        self,
        session: OpenVinoSession,
        inputs: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
    ) -> None:
        self.session, self.request = session, session.compiled.create_infer_request()
        self.buffers, self.sources = dict(outputs), dict(inputs)
        self.stopped = False
        for name, buffer in inputs.items():
            if name in session.takes:
                self.request.set_tensor(name, session.tensor(buffer))

    def __call__(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        held = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        try:
            for name, array in held.items():
                self.request.set_tensor(name, self.session.tensor(array))
            self._check_stopped()
            self.request.start_async()  # ``infer`` could not be cancelled
            self.request.wait()
            self._check_stopped()  # between the check above and the start nothing was cancelled
        except (RuntimeError, MemoryError) as error:
            raise failure(error, "OpenVINO failed", _reason(error)) from None
        for name, array in outputs.items():
            array[...] = self._result(name).reshape(array.shape)
        if self.buffers:
            self._store()

    def stop(self) -> None:
        self.stopped = True  # for a run that has not begun yet
        self.request.cancel()

    def _check_stopped(self) -> None:
        if self.stopped:
            raise BackendError("OpenVINO failed: the run was stopped")

    def _store(self) -> None:
        """Write the new entries into the buffers."""
        for name, slots in zip(self.session.presents, self._result(SLOTS), strict=True):
            buffer, source = self.buffers[name], self.sources[f"past_{name[8:]}"]
            if buffer.ctypes.data != source.ctypes.data:
                buffer[...] = source
            entries = self._result(name)
            if entries.shape[2] == 1:
                buffer[np.arange(len(slots)), :, slots] = entries[:, :, 0]
                continue
            for row, first in enumerate(slots):
                buffer[row, :, first : first + entries.shape[2]] = entries[row]

    def _result(self, name: str) -> np.ndarray:
        tensor = self.request.get_tensor(name)
        found: np.ndarray = tensor.data
        return found.view(np.uint16) if found.dtype.itemsize == 2 and _is_bf16(tensor) else found


def _is_bf16(tensor: Any) -> bool:
    return str(tensor.element_type.get_type_name()) == "bf16"


def _check_ports(path: Path, graph: Graph, compiled: Any) -> None:
    """The inputs and outputs are the manifest's, less caches that are only written."""
    again = "make it again with lvlm-build engine"
    taken, given = _names(compiled.inputs), _names(compiled.outputs)
    inputs = {p.name for p in graph.inputs}
    missing = {name for name in inputs - taken if not name.startswith("past_")}
    if missing or len(inputs & taken) != len(compiled.inputs):
        raise BackendError(f"{path} has other inputs than the manifest lists; {again}")
    outputs = {p.name for p in graph.outputs}
    if outputs - given or len((outputs | {SLOTS}) & given) != len(compiled.outputs):
        raise BackendError(f"{path} has other outputs than the manifest lists; {again}")


def _names(ports: Any) -> set[str]:
    """OpenVINO gives a port the names of values that it found to be the same, too."""
    return {name for port in ports for name in port.names}


def _reason(error: Exception) -> str:
    """The last line of OpenVINO's message that says something; the first ones name its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
