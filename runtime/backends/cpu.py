"""ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvlm.runtime.backends import require
from lvlm.runtime.backends._mapped_weights import MappedWeights
from lvlm.runtime.backends._onnxruntime import OnnxRuntime, OrtSession
from lvlm.runtime.bundle import Graph, Manifest
from lvlm.runtime.errors import BackendError

TARGET = "ort-cpu"  # whose form of a graph it runs where the bundle has one


class Backend(OnnxRuntime):
    """Host memory; buffers are numpy arrays. All sessions read the weights from one mapping."""

    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        ort = require(
            "onnxruntime", "install lvlm-deploy[cpu] (or lvlm-deploy[cuda] on NVIDIA machines)"
        )
        super().__init__(ort, ["CPUExecutionProvider"], threads)
        self.weights = MappedWeights(ort)

    def load(self, folder: Path, manifest: Manifest, name: str) -> OrtSession:
        if manifest.dtype == "bfloat16":
            raise BackendError(
                "this bundle is in bf16, which is for GPU targets; for the CPU export it with "
                "--dtype fp32 (or fp16)"
            )
        return super().load(folder, manifest, name)

    def file(self, folder: Path, graph: Graph) -> Path:
        return folder / graph.lowered.get(TARGET, graph.file)

    def configure(self, options: Any, folder: Path, manifest: Manifest, graph: Graph) -> None:
        for name, value in self.weights.of(folder, graph.weights, manifest.weights).items():
            options.add_initializer(name, value)
        packs = manifest.quantization is not None and TARGET in graph.lowered
        if graph is not manifest.graphs["decode"] and not packs:
            # Packing is a private copy, and worth it for few rows only (docs/cpu.md); but products
            # of quantized weights have no fast kernel without.
            options.add_session_config_entry("session.disable_prepacking", "1")
