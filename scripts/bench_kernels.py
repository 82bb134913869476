"""Comparison of ONNX Runtime's CPU kernels for what decode and prefill need.

    python scripts/bench_kernels.py attention --threads 2
    python scripts/bench_kernels.py matmuls --threads 2

Every figure is the median time of one node in a graph of several alike, each with its own weights
or cache, so that nothing stays in the CPU's own caches that would not in a model.
docs/notes/cpu.md has a table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from kernel_runs import KernelSession, bind, cpu_name, graph, measure, read_bandwidth
from onnx import helper

CLOCK = {"wall": time.perf_counter, "cpu": time.thread_time}


@dataclass(frozen=True)
class How:
    """Threads of ONNX Runtime, and the clock that figures are read on."""

    threads: int
    clock: Callable[[], float]


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
MATMULS = ((576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152))
CACHE_BYTES = 64 << 20  # of all caches of a graph: more than a CPU's own caches hold


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("attention", "matmuls"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", type=int, nargs="*", help="which of the shapes, by number")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16])
    parser.add_argument(
        "--clock", choices=CLOCK, default="wall", help="cpu: of one thread, on a busy machine"
    )
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu counts one thread; add --threads 1")
    how = How(args.threads, CLOCK[args.clock])
    print(f"onnxruntime {ort.__version__}, {args.threads} threads, {cpu_name()}")
    print(f"reads of 1 GiB: {read_bandwidth(args.threads) / 1e9:.1f} GB/s")
    if args.what == "attention":
        attention(how, [HEADS[i] for i in args.heads or range(len(HEADS))], args.rows)
    else:
        matmuls(how, args.rows)


# Attention of one new token over a cache


def attention(how: How, shapes: list[Heads], rows: list[int]) -> None:
    """A table of microseconds per layer."""
    print(f"{'heads':10s} {'capacity':>8s} {'rows':>4s} {'valid':>6s}", *FORMS, sep="  ")
    for heads in shapes:
        for capacity in CAPACITIES:
            for batch in rows:
                for valid in (0.25, 1.0):
                    times = [
                        time_attention(form, heads, capacity, batch, valid, how)
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
    how: How,
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
    with KernelSession(model, how.threads) as loaded:
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
        return measure(lambda: loaded.run_with_iobinding(binding), how.clock) / layers


# MatMuls


def matmuls(how: How, rows: list[int]) -> None:
    """A table of microseconds per MatMul."""
    kinds = [(form, packed) for form in ("MatMul [K,N]", "Gemm [N,K]") for packed in (False, True)]
    names = [f"{form}{' packed' if packed else ''}" for form, packed in kinds]
    print(f"{'K x N':>12s} {'rows':>4s}", *names, sep="  ")
    for depth, width in MATMULS:
        found = {kind: list(time_linears(depth, width, *kind, rows, how)) for kind in kinds}
        for i, count in enumerate(rows):
            cells = [f"{1e6 * found[k][i]:{len(n)}.0f}" for k, n in zip(kinds, names, strict=True)]
            print(f"{f'{depth} x {width}':>12s} {count:4d}", *cells, sep="  ", flush=True)


def time_linears(
    depth: int, width: int, form: str, packed: bool, rows: list[int], how: How
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
    with KernelSession(model, how.threads, packed) as loaded:
        for count in rows:
            binding = loaded.io_binding()
            x = random.standard_normal((count, depth), np.float32)
            bind(binding.bind_input, "x", x)
            results = [np.empty((count, width), np.float32) for _ in weights]
            for w, result in zip(weights, results, strict=True):
                bind(binding.bind_output, f"out_{w}", result)
            yield measure(lambda b=binding: loaded.run_with_iobinding(b), how.clock) / copies  # type: ignore[misc]


if __name__ == "__main__":
    main()
