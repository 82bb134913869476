"""Which of ONNX Runtime's CPU kernels is fastest for what decode and prefill need.

    python scripts/bench_kernels.py attention --threads 2
    python scripts/bench_kernels.py products --threads 2

Every figure is the median time of one node in a graph of several alike, each with its own weights
or cache, so that nothing stays in the CPU's own caches that would not in a model.
docs/notes/cpu.md has a table.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

SECONDS = 0.3  # of every figure, at least
CLOCK = {"wall": time.perf_counter, "cpu": time.thread_time}


@dataclass(frozen=True)
class Heads:
    """One attention: query heads, key and value heads, their size."""

    queries: int
    keys: int
    size: int

    def __str__(self) -> str:
        return f"{self.queries}/{self.keys}x{self.size}"


HEADS = (Heads(9, 3, 64), Heads(32, 8, 128), Heads(32, 32, 128), Heads(16, 16, 32))
CAPACITIES = (640, 2624)
# The 135M shape: query|key|value, output, gate|up, down, head (K, N)
PRODUCTS = ((576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152))
clock = CLOCK["wall"]
CACHE_BYTES = 64 << 20  # of all caches of a graph: more than a CPU's own caches hold


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("attention", "products"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", type=int, nargs="*", help="which of the shapes, by number")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16])
    parser.add_argument(
        "--clock", choices=CLOCK, default="wall", help="cpu: of one thread, on a busy machine"
    )
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu counts one thread; add --threads 1")
    global clock
    clock = CLOCK[args.clock]
    print(f"onnxruntime {ort.__version__}, {args.threads} threads, {cpu_name()}")
    print(f"sum of 1 GiB: {read_bandwidth(args.threads) / 1e9:.1f} GB/s")
    if args.what == "attention":
        attention(args.threads, [HEADS[i] for i in args.heads or range(len(HEADS))], args.rows)
    else:
        products(args.threads, args.rows)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


def read_bandwidth(threads: int) -> float:
    """Bytes per second that a matrix-vector product reads."""
    from concurrent.futures import ThreadPoolExecutor

    parts = [np.ones((1 << 28) // threads, np.float32) for _ in range(threads)]
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - began)
    return sum(p.nbytes for p in parts) / best


# Attention of one new token over a cache


def attention(threads: int, shapes: list[Heads], rows: list[int]) -> None:
    """A table of microseconds per layer."""
    print(f"{'heads':10s} {'capacity':>8s} {'rows':>4s} {'valid':>6s}", *FORMS, sep="  ")
    for heads in shapes:
        for capacity in CAPACITIES:
            for batch in rows:
                for valid in (0.25, 1.0):
                    times = [
                        time_attention(form, heads, capacity, batch, valid, threads)
                        for form in FORMS.values()
                    ]
                    cells = [
                        f"{1e6 * t:{len(name)}.0f}" for t, name in zip(times, FORMS, strict=True)
                    ]
                    print(
                        f"{heads!s:10s} {capacity:8d} {batch:4d} {valid:6.0%}",
                        *cells,
                        sep="  ",
                        flush=True,
                    )


def standard(layer: int, heads: Heads) -> list[onnx.NodeProto]:
    """TensorScatter and Attention with a mask, over the whole capacity."""
    return [
        *scatter(layer),
        helper.make_node(
            "Attention",
            ["q4", f"present_key_{layer}", f"present_value_{layer}", "mask"],
            [f"out_{layer}"],
            scale=heads.size**-0.5,
        ),
    ]


def grouped(layer: int, heads: Heads) -> list[onnx.NodeProto]:
    """GroupQueryAttention, which appends by itself."""
    return [gqa(layer, heads, "k3", "v3", f"past_key_{layer}", f"past_value_{layer}", "present")]


def scattered(layer: int, heads: Heads) -> list[onnx.NodeProto]:
    """TensorScatter at any slot, then GroupQueryAttention, fed with its last valid entry again."""
    nodes = scatter(layer)
    for kind in ("key", "value"):
        nodes += [
            helper.make_node(
                "GatherND", [f"present_{kind}_{layer}", "last"], [f"last_{kind}_{layer}"]
            ),
            helper.make_node("Reshape", [f"last_{kind}_{layer}", "flat"], [f"flat_{kind}_{layer}"]),
        ]
    present = (f"present_key_{layer}", f"present_value_{layer}")
    return [
        *nodes,
        gqa(layer, heads, f"flat_key_{layer}", f"flat_value_{layer}", *present, "again"),
    ]


def gqa(layer: int, heads: Heads, k: str, v: str, key: str, value: str, to: str) -> onnx.NodeProto:
    return helper.make_node(
        "GroupQueryAttention",
        ["q3", k, v, key, value, "seqlens", "total"],
        [f"out_{layer}", f"{to}_key_{layer}", f"{to}_value_{layer}"],
        domain="com.microsoft",
        num_heads=heads.queries,
        kv_num_heads=heads.keys,
        scale=heads.size**-0.5,
    )


def scatter(layer: int) -> list[onnx.NodeProto]:
    return [
        helper.make_node(
            "TensorScatter",
            [f"past_{kind}_{layer}", name, "index"],
            [f"present_{kind}_{layer}"],
            axis=-2,
        )
        for kind, name in (("key", "k4"), ("value", "v4"))
    ]


FORMS: dict[str, Callable[[int, Heads], list[onnx.NodeProto]]] = {
    "TensorScatter+Attention": standard,
    "GroupQueryAttention": grouped,
    "TensorScatter+Gather+GQA": scattered,
}


def time_attention(
    form: Callable[[int, Heads], list[onnx.NodeProto]],
    heads: Heads,
    capacity: int,
    batch: int,
    valid: float,
    threads: int,
) -> float:
    """Seconds per layer; rows have lengths around ``valid`` of the capacity."""
    one = 2 * 4 * batch * heads.keys * capacity * heads.size
    layers = max(2, min(30, CACHE_BYTES // one))
    random = np.random.default_rng(0)
    spread = random.uniform(0.5, 1.5, batch) if batch > 1 and valid < 1 else np.ones(batch)
    lengths = np.clip((capacity * valid * spread).astype(np.int64), 1, capacity)
    nodes = [node for layer in range(layers) for node in form(layer, heads)]
    read = {name for node in nodes for name in node.input}
    b, n, h, d = batch, heads.queries, heads.keys, heads.size
    last = [[[[r, head, length - 1]] for head in range(h)] for r, length in enumerate(lengths)]
    possible = {
        "q4": random.standard_normal((b, n, 1, d)), "k4": random.standard_normal((b, h, 1, d)),
        "v4": random.standard_normal((b, h, 1, d)), "q3": random.standard_normal((b, 1, n * d)),
        "k3": random.standard_normal((b, 1, h * d)), "v3": random.standard_normal((b, 1, h * d)),
        "mask": (np.arange(capacity) < lengths[:, None])[:, None, None],
        "index": lengths - 1, "last": np.array(last), "flat": np.array([b, 1, h * d]),
        "seqlens": (lengths - 1).astype(np.int32), "total": np.array(lengths.max(), np.int32),
    }  # fmt: skip
    feeds = {
        name: np.ascontiguousarray(x.astype(np.float32) if x.dtype == np.float64 else x)
        for name, x in possible.items()
        if name in read
    }
    cache = (b, h, capacity, d)
    lasting = {
        f"_{kind}_{layer}": random.standard_normal(cache, np.float32)
        for layer in range(layers)
        for kind in ("key", "value")
    }
    model = graph(nodes, {**feeds, **{f"past{k}": v for k, v in lasting.items()}}, {}, 24)
    with Session(model, threads) as loaded:
        binding = loaded.io_binding()
        for name, array in feeds.items():
            bind(binding.bind_input, name, array)
        for name, array in lasting.items():
            bind(binding.bind_input, f"past{name}", array)
        for out in loaded.get_outputs():
            stem = out.name.partition("_")[0]
            if stem in ("present", "again"):
                bind(binding.bind_output, out.name, lasting[out.name.removeprefix(stem)])
            else:
                binding.bind_output(out.name, "cpu")
        return measure(lambda: loaded.run_with_iobinding(binding)) / layers


# Products


def products(threads: int, rows: list[int]) -> None:
    """A table of microseconds per product."""
    kinds = [(form, packed) for form in ("MatMul [K,N]", "Gemm [N,K]") for packed in (False, True)]
    names = [f"{form}{' packed' if packed else ''}" for form, packed in kinds]
    print(f"{'K x N':>12s} {'rows':>4s}", *names, sep="  ")
    for depth, width in PRODUCTS:
        found = {kind: list(time_linears(depth, width, *kind, rows, threads)) for kind in kinds}
        for i, count in enumerate(rows):
            cells = [f"{1e6 * found[k][i]:{len(n)}.0f}" for k, n in zip(kinds, names, strict=True)]
            print(f"{f'{depth} x {width}':>12s} {count:4d}", *cells, sep="  ", flush=True)


def time_linears(
    depth: int, width: int, form: str, packed: bool, rows: list[int], threads: int
) -> Iterator[float]:
    copies = max(1, min(60, (128 << 20) // (4 * depth * width)))
    random = np.random.default_rng(0)
    gemm = form.startswith("Gemm")
    shape = (width, depth) if gemm else (depth, width)
    transposed: dict[str, Any] = {"transB": 1} if gemm else {}
    weights = {f"w_{i}": random.standard_normal(shape, np.float32) for i in range(copies)}
    nodes = [
        helper.make_node("Gemm" if gemm else "MatMul", ["x", w], [f"out_{w}"], **transposed)
        for w in weights
    ]
    model = graph(nodes, {"x": np.zeros((1, depth), np.float32)}, weights, 24)
    with Session(model, threads, packed) as loaded:
        for count in rows:
            binding = loaded.io_binding()
            x = random.standard_normal((count, depth), np.float32)
            bind(binding.bind_input, "x", x)
            results = [np.empty((count, width), np.float32) for _ in weights]
            for w, result in zip(weights, results, strict=True):
                bind(binding.bind_output, f"out_{w}", result)
            yield measure(lambda b=binding: loaded.run_with_iobinding(b)) / copies  # type: ignore[misc]


# What both need


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


class Session:
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


def measure(run: Callable[[], object]) -> float:
    """Median seconds of a call."""
    run()
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 5:
        began = clock()
        run()
        times.append(clock() - began)
    return float(np.median(times))


if __name__ == "__main__":
    main()
