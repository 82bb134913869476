"""ONNX Runtime's TensorRT provider: it compiles the parts of a graph that TensorRT takes.

Without engines made beforehand: the provider builds them when shapes are first met, and keeps them
in the bundle. The rest of a graph runs on its CUDA provider. Full TensorRT's own engines, which
hold the weights once, are device ``tensorrt``.
"""

from __future__ import annotations

from pathlib import Path

from lvlm.core.errors import BackendError
from lvlm.runtime.backends import GraphSession, cuda
from lvlm.runtime.bundle.manifest import Graph, Manifest

TENSORRT = "TensorrtExecutionProvider"
TARGET = "ort-tensorrt"  # whose graphs it takes


class Backend(cuda.Backend):
    """Buffers are those of device cuda."""

    name = TARGET
    mend = "install the TensorRT that this onnxruntime-gpu was built for (its release notes say)"

    def __init__(self, threads: int | None = None) -> None:
        super().__init__(threads, (TENSORRT, *cuda.PROVIDERS))

    def load(self, folder: Path, manifest: Manifest, name: str) -> GraphSession:
        place = str(folder / "engines" / TARGET)
        cache = {"trt_engine_cache_enable": True, "trt_engine_cache_path": place}
        cache |= {"trt_timing_cache_enable": True, "trt_timing_cache_path": place}
        self.providers = ((TENSORRT, cache), *cuda.PROVIDERS)
        return super().load(folder, manifest, name)

    def file(self, folder: Path, graph: Graph) -> Path:
        lowered = folder / f"{Path(graph.file).stem}.{TARGET}.onnx"
        if not lowered.is_file():
            raise BackendError(
                f"{lowered} is missing; make it with lvlm-build engine {folder} --target {TARGET}"
            )
        return lowered
