"""Attention of rows that each see keys up to one of their own: what two ops share."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from lvlm.export.ops.parts.body import Body, Value

F32 = onnx.TensorProto.FLOAT
LOWEST = -3.4e38  # finite: a row that sees nothing gives no NaN
CHUNK = 128  # rows whose attention the reference holds at a time


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """Attention in fp32 [B,Hq,R,d] of rows that see the keys before their ``ends`` [B,R] int64,
    with a window the last so many of these; 0 where there is none. What none sees may be
    anything."""
    slots = torch.arange(key.shape[2], device=key.device)
    unused = slots >= ends.amax(dim=1, keepdim=True)
    keys, values = key.float().transpose(2, 3), value.float()
    values = values.masked_fill(unused[:, None, :, None], 0)
    mixed = []
    for start in range(0, query.shape[2], CHUNK):
        some = query[:, :, start : start + CHUNK].float() * scale
        end = ends[:, None, start : start + CHUNK, None]
        hidden = slots >= end
        if window:
            hidden = hidden | (slots < end - window)
        # Heads of a group go under each other: one product per key head, no repeated keys.
        logits = some.reshape(key.shape[0], key.shape[1], -1, key.shape[3]) @ keys
        logits = logits.view(*some.shape[:3], -1).masked_fill(hidden, float("-inf"))
        attention = logits.softmax(dim=-1).masked_fill(hidden, 0)
        attention = attention.view(key.shape[0], key.shape[1], -1, key.shape[2])
        mixed.append((attention @ values).view_as(some))
    return torch.cat(mixed, dim=2)


def attention_body(g: Body, visible: Value, used: Value) -> tuple[Value, Value]:
    """Attention [B,Hq,R,N] of ``query`` to ``key`` and its output over ``value``, as the query's
    type; ``visible`` [B,1,R,N] says what a row sees, ``used`` [B,N] what any does."""
    batch, heads, rows, width = (g.dim("query", axis) for axis in range(4))
    nothing = g.const(0, np.float32)
    scale = g.attribute("scale", "value_float", onnx.AttributeProto.FLOAT)
    grouped = g.Concat(batch, g.dim("key", 1), g.const([-1]), width, axis=0)
    query = g.Mul(g.Cast(g.Reshape("query", grouped), to=F32), scale)
    products = g.MatMul(query, g.Transpose(g.Cast("key", to=F32), perm=[0, 1, 3, 2]))
    logits = g.Reshape(products, g.Concat(batch, heads, rows, g.dim("key", 2), axis=0))
    # Before the softmax: whatever unused slots hold is gone, even NaN.
    attention = g.Softmax(g.Where(visible, logits, g.const(LOWEST, np.float32)), axis=-1)
    attention = g.Where(visible, attention, nothing)
    used = g.Unsqueeze(used, g.const([1, 3]))
    values = g.Where(used, g.Cast("value", to=F32), nothing)
    mixed = g.MatMul(g.Reshape(attention, g.Shape(products)), values)
    return attention, g.CastLike(g.Reshape(mixed, g.Shape("query")), "query")
