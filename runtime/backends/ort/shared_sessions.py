"""Sessions of ONNX Runtime's C library over one copy of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lvlm.runtime.backends import Buffer
from lvlm.runtime.backends.ort.c_library import LibraryHandle, OrtError, OrtLibrary
from lvlm.runtime.backends.ort.kernels.gates import kernels_made
from lvlm.runtime.backends.ort.mapped_weights import MappedWeights
from lvlm.runtime.backends.ort.sessions import check_ports, failure, types, with_repeats
from lvlm.runtime.bundle.manifest import Graph, Manifest


class SharedWeights:
    """Weights mapped from their files, and the container with their packed forms."""

    def __init__(self, path: Path, threads: int | None, kernels: Path | None = None) -> None:
        self.library, self.threads, self.kernels = OrtLibrary(path), threads, kernels
        self.container = self.library.container()
        self.mapped = MappedWeights()
        self._values: dict[tuple[Path, str], LibraryHandle] = {}

    def session(self, folder: Path, manifest: Manifest, graph: Graph, file: Path) -> SharedSession:
        """Raises OrtError."""
        given: dict[str, LibraryHandle] = {}
        for name in graph.weights:
            weight, key = manifest.weights[name], (folder, name)
            if len(weight.dims) < 2:
                continue  # small, and some kernels that pack those cannot share them
            if key not in self._values:
                data = self.mapped.bytes_of(folder, name, weight)
                value = self.library.tensor(data, weight.dtype, weight.dims)
                self._values[key] = LibraryHandle(self.library, value, "ReleaseValue", [data])
            given[name] = self._values[key]
        before = kernels_made(self.kernels)
        with self.mapped.dropped_when_read():
            handle = self.library.session(file, self.threads, given, self.container, self.kernels)
        inputs, outputs = self.library.ports(handle)
        check_ports(graph, inputs, outputs)
        gated = kernels_made(self.kernels) - before
        return SharedSession(self, handle, types(graph, outputs), outputs, gated)


class SharedSession:
    """A loaded graph. Safe to run from several threads, each with a call of its own."""

    def __init__(
        self,
        owner: SharedWeights,
        handle: LibraryHandle,
        types: dict[str, str],
        outputs: list[str],
        gated: int,
    ) -> None:
        self.owner, self.handle, self.library = owner, handle, owner.library
        self.types, self.outputs, self.gated = types, outputs, gated

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> SharedCall:
        return SharedCall(self, inputs, with_repeats(outputs, self.outputs))


class SharedCall:
    """Buffers bound once; what changes is bound anew at each call."""

    def __init__(
        self, session: SharedSession, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> None:
        self.session, self.library = session, session.library
        made = self.library.create("CreateIoBinding", session.handle.pointer)
        self.binding = LibraryHandle(self.library, made, "ReleaseIoBinding", [session.handle])
        made = self.library.create("CreateRunOptions")
        self.options = LibraryHandle(self.library, made, "ReleaseRunOptions")
        self.lasting = (dict(inputs), dict(outputs))  # keeps the memory alive
        self.ignored = [name for name in session.outputs if name not in outputs]
        for name, buffer in inputs.items():
            self._bind("BindInput", name, buffer)
        for name, buffer in outputs.items():
            self._bind("BindOutput", name, buffer)

    def __call__(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        held = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        try:
            for name, array in held.items():
                self._bind("BindInput", name, array)
            for name, array in outputs.items():
                self._bind("BindOutput", name, array)
            for name in self.ignored:
                if name not in outputs:
                    place = (self.binding.pointer, name.encode(), self.library.memory)
                    self.library.call("BindOutputToDevice", *place)
            handles = (self.session.handle, self.options, self.binding)
            self.library.call("RunWithBinding", *(handle.pointer for handle in handles))
        except OrtError as error:
            raise failure(error, "ONNX Runtime failed") from None

    def stop(self) -> None:
        self.library.call("RunOptionsSetTerminate", self.options.pointer)

    def _bind(self, how: str, name: str, array: np.ndarray) -> None:
        value = self.library.tensor(array, self.session.types[name], array.shape)
        try:
            self.library.call(how, self.binding.pointer, name.encode(), value)
        finally:
            self.library.functions["ReleaseValue"](value)  # the binding has its own reference
