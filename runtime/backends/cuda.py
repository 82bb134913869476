"""ONNX Runtime on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lvlm.core import nvidia
from lvlm.core.errors import BackendError
from lvlm.core.installing import install, require
from lvlm.runtime.backends import Buffer
from lvlm.runtime.backends.ort.sessions import OnnxRuntime, Provider, failure

# Shapes are computed on the CPU, and ops that have no CUDA kernel.
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


class Backend(OnnxRuntime):
    """Buffers are OrtValues on the GPU; ONNX Runtime copies what lies on the host."""

    name = "cuda"
    device = "cuda"
    mend = "pip install 'onnxruntime-gpu[cuda,cudnn]'"

    def __init__(
        self, threads: int | None = None, providers: Sequence[Provider] = PROVIDERS
    ) -> None:
        ort = require("onnxruntime", install("cuda"))
        available = ort.get_available_providers()
        self.first = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if self.first not in available:
            listed = ", ".join(available)
            raise BackendError(
                f"the installed onnxruntime has no {self.first}, only {listed}; "
                f"pip uninstall -y onnxruntime, then {install('cuda')}"
            )
        ort.preload_dlls()  # CUDA and cuDNN where pip put them
        super().__init__(ort, providers, threads)

    def check_started(self, providers: list[str]) -> None:
        if providers[0] != self.first:
            raise BackendError(
                f"{self.first} did not start, so ONNX Runtime would use {providers[0]}; "
                f"check the driver with nvidia-smi, and {self.mend}"
            )

    def room(self) -> int | None:
        return None

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        zeros = super().allocate(shape, dtype)
        try:
            return self.ort.OrtValue.ortvalue_from_numpy(zeros, self.device, 0)
        except Exception as error:
            raise failure(error, "a buffer cannot be allocated") from None

    def rows(self, buffer: Buffer, start: int, stop: int) -> Buffer:
        shape = tuple(buffer.shape())
        return Rows(buffer, (stop - start, *shape[1:]), buffer.data_ptr() + start * _row(buffer))

    def copy_row(self, buffer: Buffer, source: int, target: int, used: int) -> None:  # noqa: ARG002
        size, first = _row(buffer), buffer.data_ptr()
        nvidia.copy_on_device(first + target * size, first + source * size, size)

    def clear_row(self, buffer: Buffer, row: int) -> None:
        size = _row(buffer)
        nvidia.clear_on_device(buffer.data_ptr() + row * size, size)


@dataclass(frozen=True)
class Rows:
    """Part of an OrtValue, with what of it binding asks for."""

    owner: Any  # keeps the memory alive
    dims: tuple[int, ...]
    address: int

    def device_name(self) -> str:
        return str(self.owner.device_name())

    def shape(self) -> tuple[int, ...]:
        return self.dims

    def data_ptr(self) -> int:
        return self.address


def _row(buffer: Buffer) -> int:
    """Bytes of one row of an OrtValue."""
    rows = buffer.shape()[0]
    return int(buffer.tensor_size_in_bytes()) // int(rows)
