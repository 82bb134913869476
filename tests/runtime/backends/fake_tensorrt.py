"""A TensorRT that is not there: "engines" that are small JSON files naming an ONNX graph, which
ONNX Runtime computes on the memory of fake_driver.py."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from fake_driver import FakeDriver

VERSION = "1.7.1.116"
ONNX_TYPES = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16", "int64": "int64"}
TYPE_NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}


class Mode(Enum):
    INPUT = 1
    OUTPUT = 2


@dataclass
class FakeTensorRt:
    """The module ``tensorrt`` or ``tensorrt_rtx``, as far as the backends use it.

    compiling   how often TensorRT-RTX still says that it cannot be captured
    refuses     what it logs instead of loading an engine
    no_context  it has no memory for one
    """

    driver: FakeDriver
    rtx: bool = True
    compiling: int = 0
    refuses: str = ""
    no_context: bool = False
    __version__: str = VERSION
    libraries: list[str] = field(default_factory=list)
    broken_library: bool = False
    TensorIOMode = Mode
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    class ILogger:
        ERROR, INTERNAL_ERROR = "error", "internal error"

        def log(self, severity: Any, message: str) -> None: ...

    def get_plugin_registry(self) -> Any:
        def load_library(path: str) -> object:
            self.libraries.append(path)
            return None if self.broken_library else object()

        return SimpleNamespace(load_library=load_library)

    def Runtime(self, log: Any) -> FakeRuntime:  # noqa: N802
        return FakeRuntime(self, log)


@dataclass
class FakeRuntime:
    trt: FakeTensorRt
    log: Any
    engine_host_code_allowed: bool = False

    def deserialize_cuda_engine(self, data: Any) -> FakeEngine | None:
        if self.trt.refuses:
            self.log.log(self.trt.ILogger.ERROR, self.trt.refuses)
            return None
        return FakeEngine(self.trt, json.loads(bytes(data)))


class FakeEngine:
    """``built``: onnx (path), profile (dimension to min, opt, max), static (dimension to
    length), weights (names of inputs that are)."""

    def __init__(self, trt: FakeTensorRt, built: dict[str, Any]) -> None:
        self.trt, self.driver, self.built = trt, trt.driver, built
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            built["onnx"], options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = {o.name: o for o in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)
        self.reads_on_host: set[str] = set()

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self.inputs else Mode.OUTPUT

    def dtype(self, name: str) -> str:
        port = self.inputs.get(name) or self.outputs[name]
        return ONNX_TYPES[port.type.removeprefix("tensor(").removesuffix(")")]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=TYPE_NAMES[self.dtype(name)])

    def is_shape_inference_io(self, name: str) -> bool:
        return name in self.reads_on_host

    def dims(self, name: str) -> list[int | str | None]:
        """None: an extent that is computed, of outputs."""
        port = self.inputs.get(name) or self.outputs[name]
        return [self.built["static"].get(d, d) for d in port.shape]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else -1 for d in self.dims(name))

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        assert profile == 0
        ranges = self.built["profile"]
        return [
            [d if isinstance(d, int) else ranges[d][which] for d in self.dims(name)]
            for which in range(3)
        ]

    def create_execution_context(self, strategy: str) -> FakeContext | None:
        assert strategy == "user managed"
        if self.trt.no_context:
            return None
        return FakeRtxContext(self) if self.trt.rtx else FakeContext(self)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.driver = engine, engine.driver
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.workspace = (0, 0)
        self.known: dict[str, tuple[int, ...]] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if -1 in self.engine.get_tensor_shape(name):
            low, _, high = self.engine.get_tensor_profile_shape(name, 0)
            fits = all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
        else:
            fits = self.engine.get_tensor_shape(name) == tuple(shape)
        self.shapes[name] = tuple(shape)
        return fits

    def infer_shapes(self) -> list[str]:
        dynamic = (n for n in self.engine.inputs if -1 in self.engine.get_tensor_shape(n))
        return [name for name in dynamic if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        lengths = {
            dim: length
            for port, shape in self.shapes.items()
            for dim, length in zip(self.engine.dims(port), shape, strict=True)
        }
        dims = self.engine.dims(name)
        if None in dims:
            return self._computed(name)
        return tuple(lengths[d] if isinstance(d, str) else d for d in dims)  # type: ignore[misc]

    def _computed(self, name: str) -> tuple[int, ...]:
        key = repr((name, sorted(self.shapes.items())))
        if key not in self.known:
            engine = self.engine
            fixed = {n: engine.get_tensor_shape(n) for n in engine.inputs}  # weights
            shapes = {**fixed, **self.shapes}
            zeros = {n: np.zeros(s, engine.dtype(n)) for n, s in shapes.items()}
            self.known[key] = self.engine.session.run([name], zeros)[0].shape
        return self.known[key]

    def update_device_memory_size_for_shapes(self) -> int:
        return 16 * sum(math.prod(shape) for shape in self.shapes.values())

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes()
        self.driver.memory(address, size)
        self.workspace = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.driver.memory(address, self._size(name))
        assert address % 256 == 0, f"{name} at {address:#x}: TensorRT wants 256-byte alignment"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.driver.stream
        assert not self.infer_shapes()
        shapes = {name: self.get_tensor_shape(name) for name in self.engine.names}
        addresses = dict(self.addresses)
        assert set(addresses) == set(self.engine.names)
        workspace = self.workspace

        def work() -> None:
            self.driver.memory(*workspace)[:] = 0xEE  # whose content nobody may count on
            binding = self.engine.session.io_binding()
            for name, address in addresses.items():
                dtype = self.engine.dtype(name)
                kind: Any = 16 if dtype == "bfloat16" else np.dtype(dtype).type
                memory = self.driver.memory(address, self._size(name, shapes[name]))
                is_input = name in self.engine.inputs
                bind = binding.bind_input if is_input else binding.bind_output
                bind(name, "cpu", 0, kind, shapes[name], memory.ctypes.data)
            self.engine.session.run_with_iobinding(binding)

        graph = Path(self.engine.built["onnx"]).name.partition(".")[0]
        self.driver.put(work, "run", graph, addresses)
        return True

    def _size(self, name: str, shape: Sequence[int] | None = None) -> int:
        dtype = self.engine.dtype(name)
        item = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
        return math.prod(self.get_tensor_shape(name) if shape is None else shape) * item


class FakeRtxContext(FakeContext):
    """TensorRT-RTX says whether it can be captured: not while it still compiles kernels."""

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream == self.driver.stream
        self.engine.trt.compiling -= 1
        return self.engine.trt.compiling < 0
