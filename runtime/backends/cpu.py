"""ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlm.core.errors import BackendError
from lvlm.core.installing import install, require
from lvlm.runtime.backends import Gate, GraphSession
from lvlm.runtime.backends.ort.c_library import OrtError, find_library
from lvlm.runtime.backends.ort.kernels.gates import KernelGate
from lvlm.runtime.backends.ort.kernels.kernel_library import kernel_library
from lvlm.runtime.backends.ort.sessions import OnnxRuntime, failure
from lvlm.runtime.backends.ort.shared_sessions import SharedWeights
from lvlm.runtime.bundle.manifest import Graph, Manifest

TARGET = "ort-cpu"  # whose form of a graph it runs where the bundle has one


class Backend(OnnxRuntime):
    """Host memory; buffers are numpy arrays. All sessions have one copy of the weights, and the
    kernels of ``lvlm-build cpu`` where those are found.

    Where onnxruntime comes without its C library each session loads its own copy.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        library = find_library()
        # The Python package takes 19 MB for calls that are of no use here
        ort = None if library else require("onnxruntime", _mend())
        super().__init__(ort, ["CPUExecutionProvider"], threads)
        self.kernels = kernel_library()
        try:
            self.shared = None if library is None else SharedWeights(library, threads, self.kernels)
        except (OrtError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise BackendError(f"onnxruntime cannot be loaded ({reason}); {_mend()}") from None

    def load(self, folder: Path, manifest: Manifest, name: str) -> GraphSession:
        if manifest.dtype == "bfloat16":
            raise BackendError(
                "this bundle is in bf16, which is for GPU targets; for the CPU export it with "
                "--dtype fp32 (or fp16)"
            )
        if self.shared is None:
            return super().load(folder, manifest, name)
        graph = manifest.graphs[name]
        try:
            return self.shared.session(folder, manifest, graph, self.file(folder, graph))
        except OrtError as error:
            raise failure(error, f"{graph.file} cannot be loaded on device {self.name}") from None

    def gate(self) -> Gate | None:
        return None if self.kernels is None else KernelGate(self.kernels)

    def options(self) -> Any:
        options = super().options()
        options.enable_mem_pattern = False  # both as the shared sessions have it
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.kernels is not None:
            options.register_custom_ops_library(str(self.kernels))
        return options

    def file(self, folder: Path, graph: Graph) -> Path:
        return folder / graph.lowered.get(TARGET, graph.file)


def _mend() -> str:
    return f"{install('cpu')} (or with the extra cuda, on NVIDIA machines)"
