"""``lvlm::ScoredAttention``: attention and, from the same logits, what every key receives.

Attention beside CacheImportance computes every logit three times: once for the output, twice for
the sums. The denominators that the output needs are those that the sums need: here it is twice. It
stands in lowered graphs, where attention of prompts is a plugin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx
import torch
from onnx.defs import OpSchema

from lvlm.core.errors import ParameterError
from lvlm.export.ops import cache_importance
from lvlm.export.ops.op import DOMAIN, FLOATS, VERSION, Attribute, Op, OpSample, Shape, register
from lvlm.export.ops.parts.body import Body
from lvlm.export.ops.parts.input_checks import check_heads
from lvlm.export.ops.parts.row_attention import F32, attend_rows, attention_body

SCHEMA = register(
    OpSchema(
        "ScoredAttention",
        DOMAIN,
        VERSION,
        doc="Attention, and that which each position receives, summed over queries, mean of heads.",
        inputs=[
            OpSchema.FormalParameter("query", "T", "[B, Hq, R, d]: rows, rotary embedding applied"),
            OpSchema.FormalParameter("key", "T", "[B, Hkv, N, d]: Hq a multiple of Hkv"),
            OpSchema.FormalParameter("value", "T", "[B, Hkv, N, d]"),
            OpSchema.FormalParameter(
                "query_slot", "I", "[B, R]: index of each query's own key, -1: unused row"
            ),
            OpSchema.FormalParameter("length", "I", "[B]: valid keys, the first of each row"),
        ],
        outputs=[
            OpSchema.FormalParameter("output", "T", "[B, Hq, R, d]: 0 for unused rows"),
            OpSchema.FormalParameter("importance", "F", "[B, N]: 0 where nothing attends"),
        ],
        type_constraints=[
            ("T", FLOATS, "data"),
            ("I", ["tensor(int64)"], "indices and lengths"),
            ("F", ["tensor(float)"], "importance"),
        ],
        attributes=[OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, "factor of query · key")],
    )
)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_slot: torch.Tensor,
    length: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [B, Hq, R, d], importance [B, N] fp32): CacheImportance, and its attention over
    ``value``.

    query, key, query_slot, length, scale  as of CacheImportance
    value  [B, Hkv, N, d] of the same dtype; what no used row sees may hold anything

    Raises ParameterError if shapes do not fit together.
    """
    outputs(query, key, value, query_slot, length, scale=scale)
    ends = torch.where(query_slot < length[:, None], query_slot, -1) + 1
    output = attend_rows(query, key, value, ends, scale=scale).to(query.dtype)
    return output, *cache_importance.reference(query, key, query_slot, length, scale=scale)


def outputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_slot: torch.Tensor,
    length: torch.Tensor,
    *,
    scale: float,  # noqa: ARG001  (shapes do not depend on it)
) -> Sequence[tuple[torch.dtype, Shape]]:
    """(dtype, shape) of the outputs. Raises ParameterError as ``reference`` does."""
    check_heads(SCHEMA.name, query, key)
    if key.shape != value.shape or query_slot.dim() != 2 or length.dim() != 1:
        raise ParameterError(
            "ScoredAttention: key and value are [B, Hkv, N, d], query_slot [B, R] and length [B]"
        )
    return [(query.dtype, query.shape), (torch.float32, (key.shape[0], key.shape[2]))]


def function(attributes: Mapping[str, Attribute]) -> onnx.FunctionProto:  # noqa: ARG001
    """The op as standard ops, all logits at once; ``scale`` is read from the node."""
    g = Body()
    slots = g.arange(g.dim("key", 2))
    length = g.Unsqueeze("length", g.const([1]))
    own = g.Where(g.Less("query_slot", length), "query_slot", g.const(-1))
    last = g.ReduceMax(own, g.const([1]))  # [B,1]
    visible = g.LessOrEqual(slots, g.Unsqueeze(own, g.const([1, 3])))
    attention, output = attention_body(g, visible, g.LessOrEqual(slots, last))
    received = g.ReduceSum(attention, g.const([1, 2]), keepdims=0)
    importance = g.Div(received, g.Cast(g.dim("query", 1), to=F32))
    return g.function(SCHEMA, [output, importance], {}, required=["scale"])


def samples() -> Iterator[OpSample]:
    """Those of CacheImportance that see all keys up to their own, with values."""
    nan = float("nan")
    layouts = {
        # name: (lengths, query slots, query heads, key heads, head size)
        "a prompt, multi-head": ([9], [[*range(9)]], 4, 4, 32),
        "a prompt, grouped, ragged": ([8, 5, 1], [[*range(8)]] * 3, 6, 2, 64),
        "several tiles": ([70, 66], [[*range(70)]] * 2, 2, 1, 80),
        "out of order": ([7, 6], [[6, -1, 2, 0], [3, 5, -1, 4]], 4, 2, 96),
        "one query": ([1], [[0]], 2, 1, 128),
    }
    for seed, (name, (lengths, slots, heads, key_heads, width)) in enumerate(layouts.items()):
        random = torch.Generator().manual_seed(seed)
        length, query_slot = torch.tensor(lengths), torch.tensor(slots)
        batch, rows = query_slot.shape
        query = torch.randn(batch, heads, rows, width, generator=random) * 3
        states = torch.randn(2, batch, key_heads, max(lengths), width, generator=random)
        unused = (query_slot < 0) | (query_slot >= length[:, None])
        query = query.masked_fill(unused[:, None, :, None], nan)
        padding = torch.arange(max(lengths)) >= length[:, None]
        key, value = states.masked_fill(padding[:, None, :, None], nan)
        for dtype in (torch.float32, torch.float16):
            data = query.to(dtype), key.to(dtype), value.to(dtype)
            attributes = {"scale": width**-0.5}
            yield OpSample(f"{name}, {str(dtype)[6:]}", (*data, query_slot, length), attributes)


OP = Op(
    name="ScoredAttention",
    schema=SCHEMA,
    axes={
        "query": "B h R d",
        "key": "B k N d",
        "value": "B k N d",
        "query_slot": "B R",
        "length": "B",
    },
    reference=reference,
    outputs=outputs,
    function=function,
    samples=samples,
    # As of CacheAttention; importance alone is nearer
    tolerance={torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2},
)
