"""``lvlm::CacheAttention``: causal attention over the entries that are valid.

For TensorRT versions whose own attention needs a mask over every slot of the cache, or is not
imported: what lies behind a row's valid entries is not read. One op for decode (one row), extend
(new rows behind a cache) and prefill (a prompt over itself); it stands in lowered graphs only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx
import torch
from onnx.defs import OpSchema
from onnx.helper import make_attribute

from lvlm.core.errors import ParameterError
from lvlm.export.ops.op import DOMAIN, FLOATS, VERSION, Attribute, Op, OpSample, Shape, register
from lvlm.export.ops.parts.body import Body
from lvlm.export.ops.parts.input_checks import check_heads
from lvlm.export.ops.parts.row_attention import attend_rows, attention_body

# Of a head: what kernels come for
LARGEST_HEAD, HEAD_MULTIPLE = 128, 8

SCHEMA = register(
    OpSchema(
        "CacheAttention",
        DOMAIN,
        VERSION,
        doc="Attention of rows that stand one behind the other, each over the keys up to its own.",
        inputs=[
            OpSchema.FormalParameter("query", "T", "[B, Hq, R, d], rotary embedding applied"),
            OpSchema.FormalParameter("key", "T", "[B, Hkv, N, d]: Hq a multiple of Hkv"),
            OpSchema.FormalParameter("value", "T", "[B, Hkv, N, d]"),
            OpSchema.FormalParameter(
                "seen", "I", "[B]: keys that the first row sees; every later one sees one more"
            ),
        ],
        outputs=[OpSchema.FormalParameter("output", "T", "[B, Hq, R, d]")],
        type_constraints=[("T", FLOATS, "data"), ("I", ["tensor(int64)"], "counts")],
        attributes=[
            OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, "factor of query · key"),
            OpSchema.Attribute("window", make_attribute("window", 0), "if not 0, the last so many"),
        ],
    )
)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
) -> tuple[torch.Tensor]:
    """(output [B, Hq, R, d],): computed in fp32, then of the queries' dtype.

    query   [B, Hq, R, d] fp32, fp16 or bf16, key and value [B, Hkv, N, d] of the same dtype
    seen    [B] int64; row r sees keys 0 … seen + r - 1, those that there are; none: output 0. Keys
            and values that no row sees may hold anything, all others anything finite
    scale   of the logits, usually d ** -0.5
    window  if not 0: of these keys the last so many only

    Query head h reads key head h // (Hq / Hkv). Raises ParameterError if shapes do not fit.
    """
    outputs(query, key, value, seen, scale=scale, window=window)
    ends = seen[:, None] + torch.arange(query.shape[2], device=seen.device)
    output = attend_rows(query, key, value, ends, scale=scale, window=window)
    return (output.to(query.dtype),)


def outputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    *,
    scale: float,  # noqa: ARG001  (shapes do not depend on it)
    window: int = 0,
) -> Sequence[tuple[torch.dtype, Shape]]:
    """(dtype, shape) of the output. Raises ParameterError as ``reference`` does."""
    check_heads(SCHEMA.name, query, key)
    if key.shape != value.shape or seen.dim() != 1:
        raise ParameterError(
            "CacheAttention: key and value are [B, Hkv, N, d], seen [B], not "
            f"{tuple(key.shape)}, {tuple(value.shape)} and {tuple(seen.shape)}"
        )
    if window < 0:
        raise ParameterError(f"CacheAttention: window is {window}; 0, or at least 1, is needed")
    return [(query.dtype, query.shape)]


def function(attributes: Mapping[str, Attribute]) -> onnx.FunctionProto:  # noqa: ARG001
    """The op as standard ops; ``scale`` and ``window`` are read from the node."""
    g = Body()
    rows, slots = g.dim("query", 2), g.arange(g.dim("key", 2))
    first = g.Unsqueeze("seen", g.const([1]))
    ends = g.Unsqueeze(g.Add(first, g.arange(rows)), g.const([1, 3]))
    window = g.attribute("window", "value_int", onnx.AttributeProto.INT)
    within = g.GreaterOrEqual(slots, g.Sub(ends, window))
    within = g.Or(g.Equal(window, g.const(0)), within)
    visible = g.And(g.Less(slots, ends), within)
    used = g.Less(slots, g.Add(first, g.Sub(rows, g.const([1]))))
    _, output = attention_body(g, visible, used)
    return g.function(SCHEMA, [output], {}, required=["scale", "window"])


def samples() -> Iterator[OpSample]:
    """One row and several, over a cache and over themselves; ragged, one valid entry, a full cache,
    a window; head layouts; keys that no row sees are NaN."""
    nan = float("nan")
    layouts = {
        # name: (seen, query heads, key heads, rows, keys, head size, window)
        "one row, grouped, ragged": ([7, 1, 12], 6, 2, 1, 12, 64, 0),
        "one row, multi-head": ([9], 3, 3, 1, 11, 32, 0),
        "one row, several splits": ([290, 5], 4, 1, 1, 300, 128, 0),
        "one row, window": ([150, 3], 4, 2, 1, 160, 80, 20),
        "behind a cache": ([5, 1], 6, 2, 5, 12, 96, 0),
        "behind a cache, several splits": ([280], 20, 1, 3, 300, 40, 0),
        "behind a cache, window": ([140, 2], 18, 1, 3, 150, 64, 9),
        "a prompt": ([1], 3, 3, 9, 9, 32, 0),
        "a prompt of several tiles, grouped": ([1, 1], 4, 2, 70, 70, 64, 0),
        "wide heads": ([3], 2, 1, 17, 21, 128, 0),
    }
    for seed, (name, (seen, heads, key_heads, rows, positions, width, window)) in enumerate(
        layouts.items()
    ):
        random = torch.Generator().manual_seed(seed)
        query = torch.randn(len(seen), heads, rows, width, generator=random) * 3
        key, value = torch.randn(2, len(seen), key_heads, positions, width, generator=random)
        counts = torch.tensor(seen)
        unused = torch.arange(positions) >= (counts + rows - 1)[:, None]
        key, value = (t.masked_fill(unused[:, None, :, None], nan) for t in (key, value))
        for dtype in (torch.float32, torch.float16):
            given = (query.to(dtype), key.to(dtype), value.to(dtype), counts)
            attributes = {"scale": width**-0.5, "window": window}
            yield OpSample(f"{name}, {str(dtype)[6:]}", given, attributes)


OP = Op(
    name="CacheAttention",
    schema=SCHEMA,
    axes={"query": "B h R d", "key": "B k N d", "value": "B k N d", "seen": "B"},
    reference=reference,
    outputs=outputs,
    function=function,
    samples=samples,
    # Half precision: kernels multiply probabilities as the data's type, as fused attention does.
    tolerance={torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2},
)
