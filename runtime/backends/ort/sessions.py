"""ONNX Runtime: sessions whose lasting buffers are bound once, on one execution provider."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvlm.core.errors import BackendError
from lvlm.runtime.backends import Buffer, GraphSession
from lvlm.runtime.backends.host import buffers
from lvlm.runtime.bundle.manifest import Graph, Manifest

ONNX_BF16 = 16  # TensorProto.BFLOAT16: numpy has no type to say it with
# After the name of an output that is a buffer of the cache: the same memory, given once more by an
# operator of a lowered graph, which writes in place only where it is bound to what it reads.
AGAIN = "_again"
Provider = str | tuple[str, dict[str, Any]]
Place = tuple[str, tuple[int, ...], int]  # device, shape, address


class OnnxRuntime(buffers.HostMemory):
    """Base of the backends of ONNX Runtime. Buffers are bound by address.

    ``providers`` in order of preference, by name or as (name, options); the first one must start,
    or loading is an error.
    """

    name: str
    static_capacity = False
    device = "cpu"  # where ``allocate`` puts buffers

    def __init__(self, ort: Any, providers: Sequence[Provider], threads: int | None) -> None:
        self.ort, self.providers, self.threads = ort, providers, threads

    def load(self, folder: Path, manifest: Manifest, name: str) -> GraphSession:
        graph = manifest.graphs[name]
        try:
            session = self.ort.InferenceSession(
                str(self.file(folder, graph)), self.options(), providers=list(self.providers)
            )
        except Exception as error:
            raise failure(error, f"{graph.file} cannot be loaded on device {self.name}") from None
        self.check_started(session.get_providers())
        given = [o.name for o in session.get_outputs()]
        check_ports(graph, [i.name for i in session.get_inputs()], given)
        return OrtSession(session, graph, given, self.device, self.ort.RunOptions)

    def options(self) -> Any:
        options = self.ort.SessionOptions()
        options.log_severity_level = 3
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        return options

    def file(self, folder: Path, graph: Graph) -> Path:
        """The form of the graph that is run."""
        return folder / graph.file

    def check_started(self, providers: list[str]) -> None:
        """Raise BackendError where ONNX Runtime fell back to other ``providers``."""


class OrtSession:
    """A loaded graph; ``device`` is where outputs go that nobody asked for."""

    def __init__(
        self,
        session: Any,
        graph: Graph,
        given: list[str],
        device: str,
        run_options: Callable[[], Any],
    ) -> None:
        self.session, self.device, self.run_options = session, device, run_options
        self.types = {n: _element_type(dtype) for n, dtype in types(graph, given).items()}
        self.outputs = given

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> OrtCall:
        return OrtCall(self, inputs, with_repeats(outputs, self.outputs))


class OrtCall:
    """Buffers bound once; what changes is bound anew at each call."""

    def __init__(
        self, owner: OrtSession, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> None:
        self.session, self.types, self.device = owner.session, owner.types, owner.device
        self.options = owner.run_options()
        self.binding = owner.session.io_binding()
        self.lasting = (dict(inputs), dict(outputs))  # keeps the memory alive
        self.ignored = [name for name in owner.outputs if name not in outputs]
        for name, buffer in inputs.items():
            self._bind(self.binding.bind_input, name, buffer)
        for name, buffer in outputs.items():
            self._bind(self.binding.bind_output, name, buffer)

    def __call__(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        held = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        for name, array in held.items():
            self._bind(self.binding.bind_input, name, array)
        for name, array in outputs.items():
            self._bind(self.binding.bind_output, name, array)
        for name in self.ignored:
            if name not in outputs:
                self.binding.bind_output(name, self.device)
        try:
            self.binding.synchronize_inputs()
            self.session.run_with_iobinding(self.binding, self.options)
            self.binding.synchronize_outputs()
        except Exception as error:
            raise failure(error, "ONNX Runtime failed") from None

    def stop(self) -> None:
        self.options.terminate = True

    def _bind(self, bind: Callable[..., None], name: str, buffer: Buffer) -> None:
        device, shape, address = _place(buffer)
        bind(name, device, 0, self.types[name], shape, address)


def check_ports(graph: Graph, inputs: list[str], outputs: list[str]) -> None:
    """Raise BackendError unless these of a loaded graph are those that the manifest lists."""
    listed = [p.name for p in graph.outputs]
    once = [name for name in outputs if name.removesuffix(AGAIN) not in listed or name in listed]
    if (inputs, once) != ([p.name for p in graph.inputs], listed):
        raise BackendError(f"{graph.file} has other inputs or outputs than the manifest lists")


def types(graph: Graph, given: Sequence[str]) -> dict[str, str]:
    """Types by the names of all inputs and ``given`` outputs."""
    listed = {p.name: p.dtype for p in (*graph.inputs, *graph.outputs)}
    return listed | {name: listed[name.removesuffix(AGAIN)] for name in given}


def with_repeats(outputs: Mapping[str, Buffer], given: Sequence[str]) -> dict[str, Buffer]:
    """``outputs`` and, of those that the graph gives again, the same buffer under that name."""
    again = {f"{n}{AGAIN}": b for n, b in outputs.items() if f"{n}{AGAIN}" in given}
    return {**outputs, **again}


def failure(error: Exception, what: str) -> BackendError:
    """The error to raise for ONNX Runtime's."""
    return buffers.failure(error, what, str(error).partition("\n")[0])


def _place(buffer: Buffer) -> Place:
    if isinstance(buffer, np.ndarray):
        return "cpu", buffer.shape, buffer.ctypes.data
    return buffer.device_name(), tuple(buffer.shape()), buffer.data_ptr()


def _element_type(dtype: str) -> Any:
    return ONNX_BF16 if dtype == "bfloat16" else np.dtype(dtype).type
