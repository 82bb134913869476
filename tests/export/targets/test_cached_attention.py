"""Decode's attention in the target ort-cpu: the kernel computes what its function does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from lvlm.export.targets.passes.graph_edits import LOWERED_DOMAIN
from lvlm.export.targets.passes.ort_attention import APPENDED, FUNCTIONS, WRITTEN, cached_attention
from lvlm.export.targets.passes.ort_fusions import MICROSOFT

TYPES = {np.dtype("float32"): TensorProto.FLOAT, np.dtype("float16"): TensorProto.FLOAT16,
         np.dtype("int32"): TensorProto.INT32, np.dtype("int64"): TensorProto.INT64}  # fmt: skip
SLOTS = 600  # several runs of entries
# query heads, key heads, head size, type, valid entries of each row with the new one
CASES = [
    (9, 3, 64, "float32", [1, 600, 257]),
    (4, 4, 32, "float32", [256]),
    (8, 1, 80, "float32", [300, 16]),
    (5, 1, 128, "float16", [511, 2]),
    (9, 3, 64, "float16", [100]),
]


def session(name: str, feeds: dict[str, np.ndarray], heads: tuple[int, int], library: Path | None,
            function: bool = True) -> onnxruntime.InferenceSession:  # fmt: skip
    outputs = ["output", "present_key", "present_value"]
    node = helper.make_node(
        *(name, FUNCTIONS[name], outputs),
        domain=LOWERED_DOMAIN,
        num_heads=heads[0],
        kv_num_heads=heads[1],
        scale=0.2,
    )
    kind = TYPES[feeds["past_key"].dtype]
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(n, TYPES[x.dtype], x.shape) for n, x in feeds.items()],
        [helper.make_tensor_value_info(n, kind, None) for n in outputs],
    )
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 24), (LOWERED_DOMAIN, 1), (MICROSOFT, 1))]
    functions = [cached_attention(name)] if function else []
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def inputs(name: str, case: tuple[Any, ...]) -> dict[str, np.ndarray]:
    heads, key_heads, width, dtype, valid = case
    random, batch = np.random.default_rng(width), len(valid)

    def values(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(dtype)

    cache = [values(batch, key_heads, SLOTS, width) for _ in range(2)]
    last = np.array(valid, np.int32) - 1
    common = {
        "past_key": cache[0],
        "past_value": cache[1],
        "last": last,
        "longest": np.array([max(valid)], np.int32),
    }
    if name == APPENDED:
        angles = random.uniform(0, 6, (SLOTS, width // 2))
        rotary = {"cos": np.cos(angles).astype(dtype), "sin": np.sin(angles).astype(dtype)}
        packed = values(batch, 1, (heads + 2 * key_heads) * width)
        positions = (last[:, None] // 2).astype(np.int64)  # not the slot: some entries have gone
        return {"qkv": packed, **common, **rotary, "position_ids": positions}
    rows = [x[np.arange(batch), :, last].reshape(batch, 1, -1) for x in cache]
    query = values(batch, 1, heads * width)
    return {"query": query, "key": rows[0], "value": rows[1], **common}


@pytest.mark.parametrize("name", [APPENDED, WRITTEN])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_computes_the_function(name: str, case: tuple[Any, ...], kernels: Path) -> None:
    feeds = inputs(name, case)
    expected = session(name, feeds, case[:2], None).run(None, feeds)
    found = session(name, feeds, case[:2], kernels, function=False).run(None, feeds)
    tolerance = 3e-6 if case[3] == "float32" else 2e-3
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=tolerance)
    for have, want in zip(found[1:], expected[1:], strict=True):
        for row, count in enumerate(case[4]):  # what lies beyond the valid means nothing
            np.testing.assert_allclose(
                have[row, :, :count], want[row, :, :count], rtol=0, atol=tolerance
            )


def test_a_cache_that_is_bound_in_place_is_written_in_place(kernels: Path) -> None:
    case = CASES[0]
    feeds = inputs(APPENDED, case)
    expected = session(APPENDED, feeds, case[:2], None).run(None, feeds)
    runner = session(APPENDED, feeds, case[:2], kernels)
    binding = runner.io_binding()
    before = feeds["past_key"].copy()
    for which in ("key", "value"):
        cache = onnxruntime.OrtValue.ortvalue_from_numpy(feeds.pop(f"past_{which}"))
        binding.bind_ortvalue_input(f"past_{which}", cache)
        binding.bind_ortvalue_output(f"present_{which}", cache)
        feeds[f"present_{which}"] = cache
    for name in list(feeds):
        if not name.startswith("present"):
            binding.bind_cpu_input(name, feeds[name])
    binding.bind_output("output")
    runner.run_with_iobinding(binding)
    np.testing.assert_allclose(binding.get_outputs()[2].numpy(), expected[0], rtol=0, atol=3e-6)
    key = feeds["present_key"].numpy()
    for row, count in enumerate(case[4]):
        np.testing.assert_array_equal(key[row, :, count:], before[row, :, count:])
        np.testing.assert_allclose(key[row, :, :count], expected[1][row, :, :count], atol=1e-6)
