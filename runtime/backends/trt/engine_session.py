"""One TensorRT engine with its buffers: shapes, addresses, and a CUDA graph of repeated calls."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvlm.core.errors import BackendError, DeviceMemoryError
from lvlm.runtime.backends import BEST, host_dtype
from lvlm.runtime.backends.trt.driver import CapturedGraph, DeviceArray, DeviceBuffer, Driver
from lvlm.runtime.backends.trt.engine_ports import GREEDY, check_ports, check_shape
from lvlm.runtime.backends.trt.staging import Staging
from lvlm.runtime.bundle.engine_sets import ALIGNMENT
from lvlm.runtime.bundle.manifest import Graph, Port

Shapes = Mapping[str, tuple[int, ...]]
Key = tuple[Any, ...]  # shapes of inputs and of outputs, addresses of buffers, of other memory
GRAPHS = 32  # that a session keeps: an engine's steps have as many batch sizes as it has slots
notes = logging.getLogger(__name__)


class Workspace:
    """Memory for what engines compute on the way. They run one after another, so they share it."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.buffer: DeviceBuffer | None = None

    @property
    def address(self) -> int:
        return 0 if self.buffer is None else self.buffer.address

    @property
    def nbytes(self) -> int:
        return 0 if self.buffer is None else self.buffer.nbytes

    def fit(self, size: int) -> None:
        """Grow to ``size`` bytes; the address changes then."""
        if self.buffer is None or self.buffer.nbytes < size:
            self.buffer = None  # freed before the new one is allocated
            self.buffer = DeviceBuffer(
                self.driver, size, "the computation", "give fewer or shorter prompts at once"
            )


@dataclass(frozen=True)
class Shared:
    """State shared by all engines of a backend; ``log`` remembers TensorRT's errors."""

    trt: Any
    driver: Driver
    workspace: Workspace
    log: Any


@dataclass(frozen=True)
class KeptGraph:
    """A captured call, and the shapes of its outputs that nobody asked for."""

    graph: CapturedGraph
    idle: Shapes


class EngineSession:
    """See backends.GraphSession. ``weights`` are the engine's inputs that never change.

    All lengths are known before a call, from the host's plan: outputs are allocated beforehand and
    the engine's own shapes are compared with them. Not thread-safe; one call at a time among all
    sessions of ``shared``.
    """

    def __init__(
        self,
        shared: Shared,
        name: str,
        engine: Any,
        graph: Graph,
        weights: Mapping[str, DeviceArray],
    ) -> None:
        trt, self.driver, self.workspace = shared.trt, shared.driver, shared.workspace
        self.log, self.name, self.engine = shared.log, name, engine
        self.inputs = {port.name: port for port in graph.inputs}
        self.outputs = {port.name: port for port in graph.outputs}
        self.weights = dict(weights)
        check_ports(trt, engine, name, graph, weights)
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        self.gives_best = BEST in names
        if self.gives_best:
            self.outputs[BEST] = GREEDY
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.context = engine.create_execution_context(managed)
        if self.context is None:
            raise DeviceMemoryError(
                f"the {name} engine cannot be made ready to run, most likely because the GPU is "
                "out of memory; close what else uses the GPU, or use a smaller dtype",
            )
        self.staging = Staging(self.driver)
        self.key: Key = ()  # of the call that is prepared
        self.graphs: OrderedDict[Key, KeptGraph] = OrderedDict()  # by key, used last at the end
        self.idle: Shapes = {}
        self.capturable = True

    def bind(
        self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> TensorRtCall:
        return TensorRtCall(self, inputs, outputs)

    def prepare(self, call: TensorRtCall, inputs: Shapes, outputs: Shapes) -> Key:
        """Everything that a call needs before it is enqueued; returns what stands for its shapes
        and addresses."""
        shapes = tuple(inputs.items()), tuple(outputs.items()), call.addresses
        key = (*shapes, *self._memory())
        if key == self.key:
            return key
        self.key = ()  # whatever fails below, nothing is replayed
        if (kept := self.graphs.get(key)) is not None:
            self.graphs.move_to_end(key)
            self._lay_out(inputs, outputs, kept.idle)
        else:
            self._set_context(call, inputs, outputs)
        self.key = (*shapes, *self._memory())
        return self.key

    def _memory(self) -> tuple[int, ...]:
        """Addresses of the memory that is not a call's own."""
        return self.workspace.address, *self.staging.addresses

    def _lay_out(self, inputs: Shapes, outputs: Shapes, idle: Shapes) -> None:
        self.staging.lay_out(
            self._typed(self.inputs, inputs),
            self._typed(self.outputs, outputs),
            self._typed(self.outputs, idle),
        )

    def _set_context(self, call: TensorRtCall, inputs: Shapes, outputs: Shapes) -> None:
        """Shapes and addresses of a call that is no graph."""
        bound = dict(call.addresses)
        self._set_shapes(dict(inputs) | call.shapes)
        self.idle = self._check_outputs(outputs, bound)
        self._lay_out(inputs, outputs, self.idle)
        self._set_memory()
        addresses = bound | {name: self.staging.address(name) for name in self.staging.slots}
        addresses |= {name: buffer.address for name, buffer in self.weights.items()}
        for name, address in addresses.items():
            if address % ALIGNMENT:
                raise BackendError(
                    f"the memory for {name} of the {self.name} engine does not begin at a "
                    f"multiple of {ALIGNMENT} bytes; build the engines of this bundle again"
                )
            if not self.context.set_tensor_address(name, address):
                raise BackendError(f"the {self.name} engine refuses the memory for {name}")

    def enqueue(self, *, again: bool) -> None:
        """Put the prepared call into the stream. ``again``: the caller repeats its last call, which
        is worth a graph; a graph of the same buffers and shapes is replayed in any case."""
        if self.key not in self.graphs and again and self._may_capture():
            try:
                graph = CapturedGraph(self.driver, self._execute)
            except BackendError as error:
                self.capturable = False
                notes.warning(
                    "lvlm: no CUDA graph for %s, each step costs more: %s", self.name, error
                )
            else:
                self._keep(graph)
        if (kept := self.graphs.get(self.key)) is not None:
            kept.graph.launch()
        else:
            self._execute()

    def _keep(self, graph: CapturedGraph) -> None:
        """For the next call with these shapes and buffers, whatever is called until then."""
        self.graphs[self.key] = KeptGraph(graph, self.idle)
        memory = self._memory()
        for key in [k for k in self.graphs if k[3:] != memory]:  # which has been freed
            del self.graphs[key]
        while len(self.graphs) > GRAPHS:
            self.graphs.popitem(last=False)

    def _execute(self) -> None:
        self.log.errors.clear()
        if not self.context.execute_async_v3(self.driver.stream):
            raise BackendError(f"TensorRT failed to run the {self.name} engine: {self.log.text()}")

    def _may_capture(self) -> bool:
        """TensorRT-RTX says itself whether it may, not while it still compiles kernels."""
        says = getattr(self.context, "is_stream_capturable", None)
        return self.capturable and (says is None or says(self.driver.stream))

    def _set_shapes(self, shapes: Shapes) -> None:
        for name, port in self.inputs.items():
            check_shape(self.engine, self.name, port, shapes[name])
            if not self.context.set_input_shape(name, shapes[name]):
                raise BackendError(f"the {self.name} engine refuses {name} of shape {shapes[name]}")
        if missing := self.context.infer_shapes():
            raise BackendError(f"the {self.name} engine lacks the shape of {', '.join(missing)}")

    def _check_outputs(self, wanted: Shapes, bound: Mapping[str, int]) -> Shapes:
        """Shapes of the outputs that nobody asked for; the others are as the engine has them."""
        idle = {}
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            if min(shape, default=0) < 0 or wanted.get(name, shape) != shape:
                raise BackendError(
                    f"the {self.name} engine gives {name} of shape {list(shape)}, not "
                    f"{list(wanted.get(name, ()))}; build the engines of this bundle again"
                )
            if name not in wanted and name not in bound:
                idle[name] = shape
        return idle

    def _set_memory(self) -> None:
        size = self.context.update_device_memory_size_for_shapes()
        self.workspace.fit(max(1, size))
        self.context.set_device_memory(self.workspace.address, self.workspace.nbytes)

    @staticmethod
    def _typed(ports: Mapping[str, Port], shapes: Shapes) -> dict[str, tuple[tuple[int, ...], str]]:
        return {name: (shape, host_dtype(ports[name].dtype)) for name, shape in shapes.items()}


class TensorRtCall:
    """See backends.Call: one upload, the computation, one download, one wait."""

    def __init__(
        self,
        session: EngineSession,
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray],
    ) -> None:
        self.session = session
        self.lasting = dict(inputs) | dict(outputs)
        self.addresses = tuple((name, array.address) for name, array in self.lasting.items())
        self.shapes = {name: array.shape for name, array in inputs.items()}
        self.last: Key = ()

    def stop(self) -> None:
        """Nothing: what is enqueued runs to its end."""

    def __call__(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        session = self.session
        key = session.prepare(self, _shapes(inputs), _shapes(outputs))
        session.staging.upload(inputs)
        session.enqueue(again=key == self.last)
        self.last = key
        session.staging.download()
        session.driver.synchronize()
        for name, array in outputs.items():
            array[...] = session.staging.view(name)


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}
