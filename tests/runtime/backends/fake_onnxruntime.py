"""An ONNX Runtime that only says that it has a GPU: its "device" values are host memory under
another name, which it does not take for the host's."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime


@dataclass
class FakeOrt:
    """onnxruntime-gpu, as far as the backend uses it."""

    available: tuple[str, ...] = ("CUDAExecutionProvider", "CPUExecutionProvider")
    starts: bool = True
    full: bool = False
    preloaded: bool = False
    arrays: dict[int, np.ndarray] = field(default_factory=dict)  # the device's, by address
    bound: list[tuple[str, str, int]] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    SessionOptions = onnxruntime.SessionOptions
    RunOptions = onnxruntime.RunOptions

    def get_available_providers(self) -> list[str]:
        return list(self.available)

    def preload_dlls(self) -> None:
        self.preloaded = True

    @property
    def OrtValue(self) -> Any:  # noqa: N802
        return SimpleNamespace(ortvalue_from_numpy=self._value)

    def _value(self, array: np.ndarray, device: str, number: int) -> Any:
        assert (device, number) == ("cuda", 0)
        if self.full:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 64\nstack")
        mine = array.copy()
        self.arrays[mine.ctypes.data] = mine
        return SimpleNamespace(
            device_name=lambda: "cuda",
            shape=lambda: list(mine.shape),
            data_ptr=lambda: mine.ctypes.data,
            tensor_size_in_bytes=lambda: mine.nbytes,
        )

    def holds(self, address: int) -> bool:
        """Whether it is of the device's memory."""
        return any(0 <= address - start < array.nbytes for start, array in self.arrays.items())

    def copy(self, target: int, source: int, size: int) -> None:
        """The driver's, within the device's memory."""
        assert self.holds(target)
        assert self.holds(source + size - 1)
        ctypes.memmove(target, source, size)

    def clear(self, target: int, size: int) -> None:
        assert self.holds(target)
        ctypes.memset(target, 0, size)

    def InferenceSession(self, path: str, options: Any, providers: list[str]) -> Any:  # noqa: N802
        providers = [p if isinstance(p, str) else p[0] for p in providers]
        assert providers == list(self.available)
        self.opened.append(Path(path).name)
        options.intra_op_num_threads = 1
        real = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return SimpleNamespace(
            get_providers=lambda: providers if self.starts else providers[1:],
            get_inputs=real.get_inputs,
            get_outputs=real.get_outputs,
            io_binding=lambda: Binding(self, real.io_binding()),
            run_with_iobinding=lambda binding, how: real.run_with_iobinding(binding.real, how),
        )


@dataclass
class Binding:
    """Checks where memory is, then binds it as the host's."""

    ort: FakeOrt
    real: Any

    def bind_input(self, *place: Any) -> None:
        self._bind(self.real.bind_input, *place)

    def bind_output(self, name: str, device: str, *place: Any) -> None:
        if place:
            self._bind(self.real.bind_output, name, device, *place)
        else:
            assert device == "cuda"  # what nobody reads stays there
            self.real.bind_output(name, "cpu")

    def _bind(
        self, bind: Any, name: str, device: str, number: int, kind: Any, shape: Any, address: int
    ) -> None:
        assert (device == "cuda") == self.ort.holds(address), name
        self.ort.bound.append((name, device, address))
        bind(name, "cpu", number, kind, shape, address)

    def synchronize_inputs(self) -> None:
        self.ort.waits.append("inputs")

    def synchronize_outputs(self) -> None:
        self.ort.waits.append("outputs")
