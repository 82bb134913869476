"""Attention of one new token over its cache, with the CPU kernel, by the type of the cache.

    lvlm-build cpu
    python scripts/bench_cached_attention.py --entries 608 4000

One node for each layer, over caches of their own, so that entries come from memory as they do in a
model. Types take turns, round by round; milliseconds of processor time of one thread, medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import helper

from lvlm.export.targets.passes.graph_edits import LOWERED_DOMAIN
from lvlm.export.targets.passes.ort_attention import APPENDED, FUNCTIONS, OUTPUTS
from lvlm.runtime.backends.ort.kernels.kernel_library import find_kernels
from lvlm.runtime.bundle.entry_form import entry_width

# Types of what is computed and of the cache
TYPES = {
    "fp32": ("float32", "float32"),
    "fp16": ("float16", "float16"),
    "int8": ("float32", "int8"),
}


def inputs(
    heads: int, key_heads: int, width: int, entries: int, kind: str
) -> dict[str, np.ndarray]:
    """Arrays for the node, whose cache is full with the new token."""
    dtype, held = TYPES[kind]
    random = np.random.default_rng(0)
    angles = random.uniform(0, 6, (entries, width // 2))
    sizes = 1, key_heads, entries, entry_width(width, held)
    cache: np.ndarray = random.integers(-100, 100, sizes)
    if held == "int8":
        cache[..., -1] = -48  # steps of a sixty-fourth
    else:
        cache = (cache / 64).astype(held)
    values = (
        random.normal(size=(1, 1, (heads + 2 * key_heads) * width)).astype(dtype),
        cache.astype(held),
        cache.astype(held),
        np.array([entries - 1], np.int32),
        np.array([entries], np.int32),
        np.cos(angles).astype(dtype),
        np.sin(angles).astype(dtype),
        np.array([[entries - 1]], np.int64),
    )
    return dict(zip(FUNCTIONS[APPENDED], values, strict=True))


def layers(
    library: Path, feeds: dict[str, np.ndarray], heads: tuple[int, int], kind: str, count: int
) -> Callable[[], None]:
    """Runs the node once for each layer, each with a cache of its own that is written in place."""
    number = helper.np_dtype_to_tensor_dtype
    kinds = [number(np.dtype(TYPES[kind][0])), *[number(np.dtype(TYPES[kind][1]))] * 2]
    node = helper.make_node(
        APPENDED,
        list(feeds),
        OUTPUTS,
        domain=LOWERED_DOMAIN,
        num_heads=heads[0],
        kv_num_heads=heads[1],
        scale=0.125,
    )
    info = helper.make_tensor_value_info
    given = [info(n, number(x.dtype), x.shape) for n, x in feeds.items()]
    made = [info(n, k, None) for n, k in zip(OUTPUTS, kinds, strict=True)]
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(LOWERED_DOMAIN, 1)]
    graph = helper.make_graph([node], "attention", given, made)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    bindings, held = [], []
    for _ in range(count):
        binding = session.io_binding()
        for name, array in feeds.items():
            if name in ("past_key", "past_value"):
                held.append(onnxruntime.OrtValue.ortvalue_from_numpy(array.copy()))
                binding.bind_ortvalue_input(name, held[-1])
                binding.bind_ortvalue_output(name.replace("past", "present"), held[-1])
            else:
                binding.bind_cpu_input(name, array)
        binding.bind_output(OUTPUTS[0])
        bindings.append(binding)

    def run() -> None:
        for binding in bindings:
            session.run_with_iobinding(binding)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--entries", type=int, nargs="+", default=[608, 2000, 4000])
    add("--heads", type=int, default=9)
    add("--key-heads", type=int, default=3)
    add("--width", type=int, default=64, help="of a head")
    add("--layers", type=int, default=30)
    add("--rounds", type=int, default=15)
    args = parser.parse_args()
    if (found := find_kernels()).path is None:
        sys.exit(f"there are no CPU kernels: {found.why}; {found.mend}")
    sizes = args.heads, args.key_heads
    print(f"{args.layers} layers, kernels for {found.instructions}; ms of one thread")
    print(f"| entries | {' | '.join(TYPES)} |\n| --: |{' --: |' * len(TYPES)}")
    for entries in args.entries:
        ways = {
            kind: layers(
                found.path, inputs(*sizes, args.width, entries, kind), sizes, kind, args.layers
            )
            for kind in TYPES
        }
        times: dict[str, list[float]] = {kind: [] for kind in ways}
        for number in range(args.rounds + 1):  # 0 warms up
            for kind, way in ways.items():
                began = time.process_time()
                way()
                if number > 0:
                    times[kind].append(1e3 * (time.process_time() - began))
        shown = " | ".join(f"{statistics.median(taken):.1f}" for taken in times.values())
        print(f"| {entries} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
