"""Linear layers by rows, with the CPU kernel and as ONNX Runtime's MatMul over packed weights.

    lvlm-build cpu
    python scripts/bench_linears.py --rows 1 2 4 8 16 32 64 128 608 --threads 1

All weights of a language model's blocks in one graph, 135 M parameters' by themselves, so that they
come from memory as they do in a model; with --bits 8 in blocks of 32, beside MatMulNBits as decode
has it (accuracy level 4) and as prefill has it (1). All take turns, round by round; GFLOP/s of the
processor time of all threads, medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from lvlm.export.targets.passes.block_linears import block_linear
from lvlm.export.targets.passes.graph_edits import LOWERED_DOMAIN
from lvlm.export.targets.passes.ort_fusions import MICROSOFT
from lvlm.export.targets.passes.ort_linears import LINEAR
from lvlm.runtime.backends.ort.kernels.kernel_library import find_kernels

FLOAT = onnx.TensorProto.FLOAT
BLOCK = 32
SHAPES = ["576x960", "576x576", "576x3072", "1536x576"]  # of a block of 135 M parameters


def linear(i: int, depth: int, columns: int) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    values = np.random.default_rng(i).standard_normal((depth, columns), dtype=np.float32)
    given = [f"x{depth}", f"w{i}"]
    node = helper.make_node(LINEAR.name, given, [f"y{i}"], domain=LOWERED_DOMAIN)
    return node, [numpy_helper.from_array(values, f"w{i}")]


def in_blocks(
    i: int, depth: int, columns: int, bits: int, level: int
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    random = np.random.default_rng(i)
    numbers = random.integers(0, 256, (columns, depth // BLOCK, BLOCK * bits // 8), dtype=np.uint8)
    scales = random.random((columns, depth // BLOCK), dtype=np.float32)
    node = helper.make_node(
        block_linear(zeroed=False).name,
        [f"x{depth}", f"w{i}", f"s{i}"],
        [f"y{i}"],
        domain=LOWERED_DOMAIN,
        K=depth,
        N=columns,
        bits=bits,
        block_size=BLOCK,
        accuracy_level=level,
    )
    return node, [
        numpy_helper.from_array(numbers, f"w{i}"),
        numpy_helper.from_array(scales, f"s{i}"),
    ]


def model_of(shapes: list[tuple[int, int]], layers: int, bits: int, level: int) -> onnx.ModelProto:
    """Each product's largest element, so that results need not be copied, and their sum."""
    nodes, weights, largest = [], [], []
    for i, (depth, columns) in enumerate(shapes * layers):
        node, stored = (
            in_blocks(i, depth, columns, bits, level) if bits else linear(i, depth, columns)
        )
        nodes.append(node)
        weights += stored
        nodes.append(helper.make_node("ReduceMax", [f"y{i}"], [f"m{i}"], keepdims=0))
        largest.append(f"m{i}")
    nodes.append(helper.make_node("Sum", largest, ["sum"]))
    inputs = [
        helper.make_tensor_value_info(f"x{depth}", FLOAT, ["rows", depth])
        for depth in dict.fromkeys(depth for depth, _ in shapes)
    ]
    graph = helper.make_graph(
        nodes, "linears", inputs, [helper.make_tensor_value_info("sum", FLOAT, [])], weights
    )
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 24), (LOWERED_DOMAIN, 1), (MICROSOFT, 1))]
    functions = [block_linear(zeroed=False)] if bits else [LINEAR]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=11)


def session(data: bytes, library: Path | None, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 608])
    add("--shapes", nargs="+", default=SHAPES, metavar="KxN", help="weights of a block")
    add("--layers", type=int, default=30, help="how many blocks")
    add("--bits", type=int, choices=[0, 8], default=0, help="of weights; 0: fp32")
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=7)
    args = parser.parse_args()
    if (found := find_kernels()).path is None:
        sys.exit(f"there are no CPU kernels: {found.why}; {found.mend}")
    shapes = [(int(k), int(n)) for k, _, n in (shape.partition("x") for shape in args.shapes)]
    data = model_of(shapes, args.layers, args.bits, 4).SerializeToString()
    ways = {"with it": session(data, found.path, args.threads)}
    if args.bits:
        exact = model_of(shapes, args.layers, args.bits, 1).SerializeToString()
        ways |= {"level 4": session(data, None, args.threads)}
        ways |= {"level 1": session(exact, None, args.threads)}
    else:
        ways |= {"MatMul": session(data, None, args.threads)}
    weights = args.layers * sum(k * n for k, n in shapes)
    what = f"{weights / 1e6:.0f} M weights, kernels for {found.instructions}"
    print(f"{what}, {args.threads} threads; GFLOP/s")
    print(f"| rows | {' | '.join(ways)} |\n| --: |{' --: |' * len(ways)}")
    for rows in args.rows:
        feeds = {f"x{k}": np.ones((rows, k), np.float32) for k, _ in shapes}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(args.rounds + 1):  # 0 warms up
            for name, way in ways.items():
                began = time.process_time()
                way.run(None, feeds)
                if number > 0:
                    times[name].append(time.process_time() - began)
        rates = [2e-9 * rows * weights / statistics.median(taken) for taken in times.values()]
        print(f"| {rows} | {' | '.join(f'{rate:.0f}' for rate in rates)} |")


if __name__ == "__main__":
    main()
