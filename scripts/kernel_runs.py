"""Small graphs of nodes alike in ONNX Runtime on the CPU: made, run and timed."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

SECONDS = 0.3  # of every figure, at least


def graph(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, np.ndarray],
    weights: Mapping[str, np.ndarray],
    opset: int,
) -> onnx.ModelProto:
    """A model whose outputs are all results that no node reads, its dynamic axes unnamed."""
    read = {name for node in nodes for name in node.input}
    outs = [
        name
        for node in nodes
        for name in node.output
        if name not in read or name.startswith("present")
    ]
    given = [
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(x.dtype),
            [None] * x.ndim if name == "x" else x.shape,
        )
        for name, x in inputs.items()
    ]
    found = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outs]
    stored = [onnx.numpy_helper.from_array(x, name) for name, x in weights.items()]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    body = helper.make_graph(nodes, "bench", given, found, stored)
    return helper.make_model(body, opset_imports=opsets, ir_version=11)


class KernelSession:
    """An InferenceSession of a model that may be too large for one message."""

    def __init__(self, model: onnx.ModelProto, threads: int, packed: bool = True) -> None:
        self.model, self.options = model, ort.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.log_severity_level = 3
        self.options.add_session_config_entry("session.disable_prepacking", str(int(not packed)))

    def __enter__(self) -> Any:
        self.folder = tempfile.TemporaryDirectory()
        path = os.path.join(self.folder.name, "bench.onnx")
        onnx.save(self.model, path, save_as_external_data=True, location="bench.bin")
        return ort.InferenceSession(path, self.options, providers=["CPUExecutionProvider"])

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()


def bind(call: Callable[..., None], name: str, array: np.ndarray) -> None:
    call(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def measure(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Median seconds of a call."""
    run()
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 5:
        began = clock()
        run()
        times.append(clock() - began)
    return float(np.median(times))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


def read_bandwidth(threads: int) -> float:
    """Bytes per second of memory that ``threads`` read."""
    from concurrent.futures import ThreadPoolExecutor

    parts = [np.ones((1 << 28) // threads, np.float32) for _ in range(threads)]
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - began)
    return sum(p.nbytes for p in parts) / best
