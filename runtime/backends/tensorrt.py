"""TensorRT with this project's plugins: data-centre and desktop GPUs, Jetson."""

from __future__ import annotations

from lvlm.runtime.backends.trt.engines import TensorRtBackend


class Backend(TensorRtBackend):
    """See TensorRt."""

    def __init__(self, threads: int | None = None) -> None:
        super().__init__("tensorrt", threads)
