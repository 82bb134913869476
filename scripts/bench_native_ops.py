"""Each CPU kernel beside the function that runs without it: one node, one thread, CPU time.

    lvlm-build cpu
    python scripts/bench_native_ops.py --tokens 608,2000,4000

Sizes are those of 135 M parameters: 9 query and 3 key heads of 64. The two take turns, round by
round; medians of the thread's own time, which other work on the machine lengthens little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from lvlm.core.discovery import discover
from lvlm.export.ops.op import Attribute, Op
from lvlm.export.targets.passes.ort_attention import APPENDED, FUNCTIONS, cached_attention
from lvlm.export.targets.passes.ort_extend import INPUTS, NAME, OUTPUTS, attention_behind
from lvlm.export.targets.passes.ort_fusions import MICROSOFT
from lvlm.export.targets.passes.ort_prefill import chunked_attention
from lvlm.runtime.backends.ort.kernels.kernel_library import find_kernels

HEADS, KEY_HEADS, WIDTH = 9, 3, 64
RECENT = 64  # queries that rank a cache
NEW = 32  # tokens read at once behind a cache
BEFORE, IMAGE, KEPT = 5, 576, 406  # tokens before an image's, of it, and of those after merging


@dataclass
class NodeCase:
    """One node: what it is called in the table, its inputs in order, the function's body."""

    label: str
    op: str
    inputs: dict[str, np.ndarray]
    outputs: list[str]
    attributes: dict[str, Any]
    function: onnx.FunctionProto

    def session(self, library: Path | None) -> onnxruntime.InferenceSession:
        domain = self.function.domain
        node = helper.make_node(
            self.op, list(self.inputs), self.outputs, domain=domain, **self.attributes
        )
        ports = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in self.inputs.items()
        ]
        results = [onnx.ValueInfoProto(name=name) for name in self.outputs]
        opsets = [helper.make_opsetid(d, v) for d, v in (("", 24), (domain, 1), (MICROSOFT, 1))]
        model = helper.make_model(
            helper.make_graph([node], self.op, ports, results),
            functions=[self.function],
            opset_imports=opsets,
            ir_version=11,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_mem_pattern = False
        if library is not None:
            options.register_custom_ops_library(str(library))
        data = model.SerializeToString()
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def cases(n: int) -> Iterator[NodeCase]:
    """Cases for a prompt, or a cache, of ``n`` tokens."""
    ops: dict[str, Op] = discover("lvlm.export.ops", "OP")
    random = np.random.default_rng(n)

    def values(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    query = values(1, HEADS, n, WIDTH)
    key, value = values(1, KEY_HEADS, n, WIDTH), values(1, KEY_HEADS, n, WIDTH)
    length = np.array([n])
    scale: dict[str, Attribute] = {"scale": WIDTH**-0.5}
    prompt = {"query": query, "key": key, "value": value}
    yield NodeCase(
        "CausalAttention", "CausalAttention", prompt, ["output"], scale, chunked_attention()
    )
    scored: dict[str, Attribute] = {**scale, "importance": 1}
    yield NodeCase(
        "CausalAttention, importance",
        "CausalAttention",
        {**prompt, "length": length},
        ["output", "importance"],
        scored,
        ops["CausalAttention"].function(scored),
    )
    yield NodeCase(
        f"CacheImportance, {RECENT} queries",
        "CacheImportance",
        {
            "query": query[:, :, -RECENT:],
            "key": key,
            "query_slot": np.arange(n - RECENT, n)[None],
            "length": length,
        },
        ["importance"],
        {**scale, "parts": 1},
        ops["CacheImportance"].function({"parts": 1}),
    )
    for mode in ("evict", "merge"):
        yield NodeCase(
            f"CacheCompact, {mode}",
            "CacheCompact",
            {
                "key": key,
                "value": value,
                "importance": random.random((1, n)).astype(np.float32),
                "length": length,
                "budget": np.array([n // 2]),
                "slots": np.arange(n // 2),
            },
            ["compact_key", "compact_value", "kept_index", "kept"],
            {"mode": mode},
            ops["CacheCompact"].function({"mode": mode}),
        )
    yield from merges(ops["TokenMerge"], n, random)
    angles = random.uniform(0, 6, (n, WIDTH // 2))
    given = [
        values(1, 1, (HEADS + 2 * KEY_HEADS) * WIDTH),
        *(key, value, np.array([n - 1], np.int32), np.array([n], np.int32)),
        *(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)),
        np.array([[n - 1]]),
    ]
    heads: dict[str, Attribute] = {"num_heads": HEADS, "kv_num_heads": KEY_HEADS, **scale}
    inputs = dict(zip(FUNCTIONS[APPENDED], given, strict=True))
    outputs = ["output", "present_key", "present_value"]
    yield NodeCase(APPENDED, APPENDED, inputs, outputs, heads, cached_attention(APPENDED))
    room = np.zeros((1, KEY_HEADS, NEW, WIDTH), np.float32)
    some = angles[None, :NEW].astype(np.float32)
    behind = [
        values(1, NEW, (HEADS + 2 * KEY_HEADS) * WIDTH),
        *(np.concatenate([x, room], axis=2) for x in (key, value)),
        *(np.array([n]), np.arange(n), np.cos(some), np.sin(some)),
        np.tri(NEW, n + NEW, n, dtype=bool)[None, None],
    ]
    yield NodeCase(
        f"{NAME}, {NEW} tokens",
        NAME,
        dict(zip(INPUTS, behind, strict=True)),
        OUTPUTS,
        {**heads, "head_size": WIDTH},
        attention_behind(),
    )


def merges(op: Op, n: int, random: np.random.Generator) -> Iterator[NodeCase]:
    """The first reduction of recipe lightvlm, by the rules that absorb."""
    image = (np.arange(n) >= BEFORE) & (np.arange(n) < BEFORE + IMAGE)
    counts = {"keep": KEPT, "keep_slots": KEPT, "out_slots": n - IMAGE + KEPT}
    inputs: dict[str, np.ndarray] = {
        "hidden": random.normal(size=(1, n, HEADS * WIDTH)).astype(np.float32),
        "importance": random.random((1, n)).astype(np.float32),
        "image_id": image[None].astype(np.int64),
        "positions": np.arange(n)[None],
    }
    for rule, centres in (("recycle", KEPT // 10), ("nearest", None), ("illava", KEPT // 20)):
        given = (
            counts if centres is None else {**counts, "recycle": centres, "recycle_slots": centres}
        )
        attributes: dict[str, Attribute] = {"merge": rule}
        yield NodeCase(
            f"TokenMerge, {rule}",
            "TokenMerge",
            {**inputs, **{k: slots(k, count) for k, count in given.items()}},
            [output.name for output in op.schema.outputs],
            attributes,
            op.function(attributes),
        )


def slots(name: str, count: int) -> np.ndarray:
    return np.arange(count) if name.endswith("slots") else np.array([[count]])


class Runner:
    """A session whose cache, if it has one, is bound in place, as the runtime does."""

    def __init__(self, case: NodeCase, library: Path | None) -> None:
        self.session = case.session(library)
        self.binding = self.session.io_binding()
        caches = {}
        for name, array in case.inputs.items():
            held = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            self.binding.bind_ortvalue_input(name, held)
            caches[name.replace("past", "present")] = held
        for name in case.outputs:
            if name in caches:
                self.binding.bind_ortvalue_output(name, caches[name])
            else:
                self.binding.bind_output(name)

    def milliseconds(self) -> float:
        began = time.thread_time()
        self.session.run_with_iobinding(self.binding)
        return 1000 * (time.thread_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="608,2000,4000", help="with commas")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found = find_kernels()
    if found.path is None:
        sys.exit(f"there are no CPU kernels: {found.why}; {found.mend}")
    print(f"kernels for {found.instructions}; {args.rounds} rounds in turn")
    print("| node | tokens | function ms | kernel ms | ratio |")
    print("| --- | --: | --: | --: | --: |")
    for n in map(int, args.tokens.split(",")):
        for case in cases(n):
            both = [Runner(case, None), Runner(case, found.path)]
            rounds = [[runner.milliseconds() for runner in both] for _ in range(args.rounds + 1)]
            function, kernel = (statistics.median(times) for times in zip(*rounds[1:], strict=True))
            print(
                f"| {case.label} | {n} | {function:.2f} | {kernel:.2f} | {function / kernel:.1f} |"
            )


if __name__ == "__main__":
    main()
