"""Extend's attention in the target ort-cpu: one node, whose kernel computes its function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from settings import CACHED

from lvlm.export.ops.op import OPSET
from lvlm.export.targets.passes.graph_edits import LOWERED_DOMAIN
from lvlm.export.targets.passes.ort_extend import INPUTS, NAME, OUTPUTS, attention_behind
from lvlm.runtime.bundle.reader import read_bundle

SLOTS = 420  # several runs of keys
# query heads, key heads, head size, type, the cache's, new tokens, entries of each row before them
CASES = [
    (9, 3, 64, "float32", "float32", 37, [300, 290]),
    (4, 4, 32, "float32", "float32", 130, [7, 200, 0]),  # several blocks
    (8, 1, 80, "float32", "float16", 5, [150]),
    (3, 1, 128, "float16", "float16", 33, [288, 1]),
    (2, 2, 16, "float32", "float32", 1, [0]),
    (200, 2, 16, "float32", "float32", 2, [20]),  # a group larger than a block
]


def inputs(case: tuple[Any, ...], slots: str = "in order") -> dict[str, np.ndarray]:
    heads, key_heads, width, dtype, cache, new, behind = case
    random, batch, index = np.random.default_rng(width), len(behind), np.array(behind)
    past, at = max(1, *behind), np.arange(new)
    used, own = np.arange(past), at[:, None] >= at
    rows = index[:, None]
    if slots == "anywhere":  # before what is written; one mask for all rows, with a window
        used, rows = random.permutation(past), rows[index.argmin(), None]
        own = own & (at[:, None] - at < 9)
    seen = (used < rows)[:, None].repeat(new, 1)
    if slots == "anywhere":
        seen = seen & (random.random(seen.shape) < 0.7)
    mask = np.concatenate([seen, np.broadcast_to(own, (len(rows), new, new))], axis=2)[:, None]
    angles = random.uniform(0, 6, (batch, new, width // 2))

    def values(dtype: str, *shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(dtype)

    given = (
        values(dtype, batch, new, (heads + 2 * key_heads) * width),
        values(cache, batch, key_heads, SLOTS, width),
        values(cache, batch, key_heads, SLOTS, width),
        index,
        used,
        np.cos(angles).astype(dtype),
        np.sin(angles).astype(dtype),
        mask,
    )
    return dict(zip(INPUTS, given, strict=True))


def session(
    feeds: dict[str, np.ndarray], case: tuple[Any, ...], library: Path | None, threads: int = 1
) -> onnxruntime.InferenceSession:
    """With the library without the function: only the kernel can do it."""
    kind = helper.np_dtype_to_tensor_dtype
    sizes = dict(zip(("num_heads", "kv_num_heads", "head_size"), case[:3], strict=True))
    node = helper.make_node(NAME, INPUTS, OUTPUTS, domain=LOWERED_DOMAIN, scale=0.2, **sizes)
    types = (feeds["qkv"].dtype, feeds["past_key"].dtype, feeds["past_key"].dtype)
    model = helper.make_model(
        helper.make_graph(
            [node],
            "attention",
            [helper.make_tensor_value_info(n, kind(x.dtype), x.shape) for n, x in feeds.items()],
            [
                helper.make_tensor_value_info(n, kind(t), None)
                for n, t in zip(OUTPUTS, types, strict=True)
            ],
        ),
        functions=[] if library else [attention_behind()],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(LOWERED_DOMAIN, 1)],
        ir_version=11,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("slots", ["in order", "anywhere"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_computes_the_function(case: tuple[Any, ...], slots: str, kernels: Path) -> None:
    feeds = inputs(case, slots)
    expected = session(feeds, case, None).run(None, feeds)
    found = session(feeds, case, kernels).run(None, feeds)
    tolerance = 3e-6 if case[3] == "float32" else 4e-3
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=tolerance)
    for have, want in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(have, want, rtol=0, atol=3e-6 if case[4] == "float32" else 4e-3)
    for have, more in zip(found, session(feeds, case, kernels, 3).run(None, feeds), strict=True):
        np.testing.assert_array_equal(have, more)


def test_a_cache_bound_in_place_is_written_in_place(kernels: Path) -> None:
    case = CASES[0]
    feeds = inputs(case)
    expected = session(feeds, case, None).run(None, feeds)
    binding = (runner := session(feeds, case, kernels)).io_binding()
    caches = {n: onnxruntime.OrtValue.ortvalue_from_numpy(feeds.pop(n)) for n in INPUTS[1:3]}
    for name, cache in caches.items():
        binding.bind_ortvalue_input(name, cache)
        binding.bind_ortvalue_output(name.replace("past", "present"), cache)
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output(OUTPUTS[0])
    runner.run_with_iobinding(binding)
    for found, want in zip((binding.get_outputs()[2], *caches.values()), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"write_index": np.array([384, 0])}, "new entries go beyond the cache"),
        ({"past_slots": np.full(300, SLOTS)}, "a slot is beyond the cache"),
        ({"past_slots": np.arange(299)}, "new tokens, cache, rotary angles and mask do not fit"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    change: dict[str, np.ndarray], message: str, kernels: Path
) -> None:
    feeds = inputs(CASES[0]) | change
    with pytest.raises(Exception, match=f"lvlm.lowered::{NAME}: {message}"):
        session(feeds, CASES[0], kernels).run(None, feeds)


def test_lowered_extend_attends_with_one_node(bundle: Callable[..., Path]) -> None:
    folder = bundle("digits-llava", max_images=2)
    layers = read_bundle(folder).text.layers
    model = onnx.load(folder / "extend.ort-cpu.onnx", load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert (kinds[NAME], kinds["Attention"], kinds["TensorScatter"]) == (layers, 0, 0)
    assert NAME in {function.name for function in model.functions}


def test_what_keeps_chosen_entries_is_left_as_it_is(bundle: Callable[..., Path]) -> None:
    """There entries are written that are not new, in an order of their own."""
    folder = bundle("digits-llava", *CACHED["elastic-cache (cached)"], max_images=2, sessions=True)
    model = onnx.load(folder / "extend.ort-cpu.onnx", load_external_data=False)
    assert NAME not in {node.op_type for node in model.graph.node}
