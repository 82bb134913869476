"""Models of one node of the target ort-cpu, with or without its function, and inputs for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lvlm.export.ops.op import OPSET
from lvlm.export.targets.passes.block_linears import block_linear
from lvlm.export.targets.passes.graph_edits import LOWERED_DOMAIN
from lvlm.export.targets.passes.ort_attention import (
    APPENDED,
    FUNCTIONS,
    READ,
    WRITTEN,
    cached_attention,
)
from lvlm.export.targets.passes.ort_extend import INPUTS, NAME, OUTPUTS, attention_behind
from lvlm.export.targets.passes.ort_fusions import MICROSOFT
from lvlm.export.targets.passes.ort_linears import LINEAR, TRANSPOSED

FLOAT = onnx.TensorProto.FLOAT
SLOTS = 600  # of decode's cache: several runs of entries
# query heads, key heads, head size, type, the cache's, valid entries of each row with the new one
CACHED = [
    (9, 3, 64, "float32", "float32", [1, 600, 257]),
    (4, 4, 32, "float32", "float32", [256]),
    (8, 1, 80, "float32", "float32", [300, 16]),
    (5, 1, 128, "float16", "float16", [511, 2]),
    (9, 3, 64, "float16", "float16", [100]),
    (2, 1, 16, "float32", "float32", [1, 600]),  # to the last byte of the cache
    (9, 3, 64, "float32", "int8", [1, 600, 257]),
    (4, 4, 32, "float16", "int8", [256]),
    (5, 1, 80, "float32", "int8", [300, 16]),
    (2, 1, 16, "float32", "int8", [1, 600]),
]
# Each with the nodes that such a cache has
CACHED_NODES = [
    (name, case)
    for case in CACHED
    for name in ((APPENDED, READ) if case[4] == "int8" else (APPENDED, WRITTEN))
]
EXTENDED_SLOTS = 420  # several runs of keys
# query heads, key heads, head size, type, the cache's, new tokens, entries of each row before them
EXTENDED = [
    (9, 3, 64, "float32", "float32", 37, [300, 290]),
    (4, 4, 32, "float32", "float32", 130, [7, 200, 0]),  # several blocks
    (8, 1, 80, "float32", "float16", 5, [150]),
    (3, 1, 128, "float16", "float16", 33, [288, 1]),
    (2, 2, 16, "float32", "float32", 1, [0]),
    (200, 2, 16, "float32", "float32", 2, [20]),  # a group larger than a block
    (2, 1, 16, "float32", "float32", 20, [400]),  # to the last byte of the cache
    (9, 3, 64, "float32", "int8", 37, [300, 290]),
    (3, 1, 128, "float16", "int8", 33, [288, 1]),
    (2, 1, 16, "float32", "int8", 20, [400]),
]
# Where attention may write into the cache that it reads
IN_PLACE = {"present_key": "past_key", "present_value": "past_value"}


def linear_model(
    weight: np.ndarray, *, transposed: bool = False, constant: bool = True, rank: int = 2
) -> onnx.ModelProto:
    function = TRANSPOSED if transposed else LINEAR
    node = helper.make_node(function.name, ["x", "weight"], ["y"], domain=LOWERED_DOMAIN)
    described = [helper.make_tensor_value_info("x", FLOAT, [None] * rank)]
    return _model(node, described, {"weight": weight}, {"y": FLOAT}, constant=constant)


def quantized(
    depth: int, columns: int, block: int, zeroed: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Weights of 8 bits in blocks, as a graph has them, and [K,N] that they stand for."""
    random = np.random.default_rng(depth + columns)
    numbers = random.integers(0, 256, (columns, depth // block, block), dtype=np.uint8)
    scales = random.normal(size=(columns, depth // block)).astype(np.float32)
    zeros = random.integers(0, 256, (columns, depth // block), dtype=np.uint8)
    less = (zeros if zeroed else np.full_like(zeros, 128))[..., None]
    weights = (numbers.astype(float) - less) * scales[..., None]
    inputs = {"numbers": numbers, "scales": scales} | ({"zeros": zeros} if zeroed else {})
    return inputs, weights.reshape(columns, depth).T


def block_linear_model(
    weights: Mapping[str, np.ndarray],
    attributes: Mapping[str, int],
    *,
    constant: bool = True,
    function: bool = False,
) -> onnx.ModelProto:
    body = block_linear("zeros" in weights)
    node = helper.make_node(body.name, ["x", *weights], ["y"], domain=LOWERED_DOMAIN, **attributes)
    described = [helper.make_tensor_value_info("x", FLOAT, ["rows", None])]
    functions = [body] if function else []
    return _model(node, described, weights, {"y": FLOAT}, functions, constant=constant)


def entries(random: np.random.Generator, held: str, *sizes: int) -> np.ndarray:
    """Some of a cache [B,Hkv,C,d], as it holds them."""
    if held != "int8":
        return random.normal(size=sizes).astype(held)
    numbers = random.integers(-127, 128, sizes)
    scales = random.integers(-56, -44, (*sizes[:3], 1))  # steps of a hundredth or two
    return np.concatenate([numbers, scales], axis=3).astype(np.int8)


def tolerance_of(case: tuple[Any, ...], half: float) -> float:
    """Of attention's output: ``half`` in fp16; entries in 8 bits are larger than others here."""
    if case[3] == "float16":
        return half
    return 1e-5 if case[4] == "int8" else 3e-6


def assert_entries(have: np.ndarray, want: np.ndarray, atol: float) -> None:
    """Entries of a cache are as they should be; of 8 bits a few numbers may be rounded the other
    way."""
    if want.dtype != np.int8:
        np.testing.assert_allclose(have, want, rtol=0, atol=atol)
        return
    steps = [2.0 ** (x[..., -1:] / 8.0) for x in (have, want)]
    apart = np.abs(have[..., :-1] * steps[0] - want[..., :-1] * steps[1])
    assert (apart <= 1.01 * np.maximum(*steps)).all()
    assert (have != want).mean() < 0.01


def cached_inputs(name: str, case: tuple[Any, ...]) -> dict[str, np.ndarray]:
    heads, key_heads, width, dtype, held, valid = case
    random, batch = np.random.default_rng(width), len(valid)

    def values(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(dtype)

    cache = [entries(random, held, batch, key_heads, SLOTS, width) for _ in range(2)]
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
    query = values(batch, 1, heads * width)
    if name == READ:
        return {
            "query": query,
            "key": common.pop("past_key"),
            "value": common.pop("past_value"),
        } | common
    rows = [x[np.arange(batch), :, last].reshape(batch, 1, -1) for x in cache]
    return {"query": query, "key": rows[0], "value": rows[1], **common}


def cached_model(
    name: str, feeds: Mapping[str, np.ndarray], case: tuple[Any, ...], *, function: bool = False
) -> onnx.ModelProto:
    kind, held = (helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for dtype in case[3:5])
    outputs = {"output": kind}
    if name != READ:
        outputs |= {"present_key": held, "present_value": held}
    node = helper.make_node(
        *(name, FUNCTIONS[name], list(outputs)),
        domain=LOWERED_DOMAIN,
        num_heads=case[0],
        kv_num_heads=case[1],
        scale=0.2,
    )
    functions = [cached_attention(name, int8=case[4] == "int8")] if function else []
    return _model(node, [], feeds, outputs, functions)


def extended_inputs(case: tuple[Any, ...], slots: str = "in order") -> dict[str, np.ndarray]:
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
        entries(random, cache, batch, key_heads, EXTENDED_SLOTS, width),
        entries(random, cache, batch, key_heads, EXTENDED_SLOTS, width),
        index,
        used,
        np.cos(angles).astype(dtype),
        np.sin(angles).astype(dtype),
        mask,
    )
    return dict(zip(INPUTS, given, strict=True))


def extended_model(
    feeds: Mapping[str, np.ndarray], case: tuple[Any, ...], *, function: bool = False
) -> onnx.ModelProto:
    types = (feeds["qkv"].dtype, feeds["past_key"].dtype, feeds["past_key"].dtype)
    outputs = dict(zip(OUTPUTS, map(helper.np_dtype_to_tensor_dtype, types), strict=True))
    sizes = dict(zip(("num_heads", "kv_num_heads", "head_size"), case[:3], strict=True))
    node = helper.make_node(NAME, INPUTS, OUTPUTS, domain=LOWERED_DOMAIN, scale=0.2, **sizes)
    functions = [attention_behind(int8=case[4] == "int8")] if function else []
    return _model(node, [], feeds, outputs, functions)


def _model(
    node: onnx.NodeProto,
    described: Sequence[onnx.ValueInfoProto],
    arrays: Mapping[str, np.ndarray],
    outputs: Mapping[str, int],
    functions: Sequence[onnx.FunctionProto] = (),
    *,
    constant: bool = False,
) -> onnx.ModelProto:
    """``arrays``: inputs by name, or initializers where they are ``constant``."""
    inputs = list(described)
    if not constant:
        for name, array in arrays.items():
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(helper.make_tensor_value_info(name, kind, array.shape))
    graph = helper.make_graph(
        [node],
        node.op_type,
        inputs,
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in arrays.items() if constant],
    )
    opsets = (("", OPSET), (LOWERED_DOMAIN, 1), (MICROSOFT, 1))
    return helper.make_model(
        graph,
        functions=functions,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets],
        ir_version=11,
    )
