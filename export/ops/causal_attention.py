"""``lvlm::CausalAttention``: attention of the prompt over itself and, if asked, its column sums.

Scores beside an attention of its own would compute every logit twice. Here a chunk of queries sees
the keys up to its end, and the attention that gives the chunk's output is summed on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx
import torch
from onnx.defs import OpSchema
from onnx.helper import make_attribute
from torch.nn.functional import scaled_dot_product_attention

from lvlm.core.errors import ParameterError
from lvlm.export.ops import cache_importance
from lvlm.export.ops.op import DOMAIN, FLOATS, VERSION, Attribute, Op, OpSample, Shape, register
from lvlm.export.ops.parts.chunked_attention import PARTS, attention_function, lowered_attention
from lvlm.export.ops.parts.input_checks import check_heads

CHUNK = 128

SCHEMA = register(
    OpSchema(
        "CausalAttention",
        DOMAIN,
        VERSION,
        doc="Causal attention; with importance=1 also what each position receives in all.",
        inputs=[
            OpSchema.FormalParameter("query", "T", "[B, Hq, N, d], rotary embedding applied"),
            OpSchema.FormalParameter("key", "T", "[B, Hkv, N, d]: Hq a multiple of Hkv"),
            OpSchema.FormalParameter("value", "T", "[B, Hkv, N, d]"),
            OpSchema.FormalParameter(
                "length",
                "I",
                "[B]: valid positions, the first of each row; with importance=1 only",
                param_option=OpSchema.FormalParameterOption.Optional,
            ),
        ],
        outputs=[
            OpSchema.FormalParameter("output", "T", "[B, Hq, N, d]"),
            OpSchema.FormalParameter(
                "importance",
                "F",
                "[B, N], padding 0; with importance=1 only",
                param_option=OpSchema.FormalParameterOption.Optional,
            ),
        ],
        type_constraints=[
            ("T", FLOATS, "data"),
            ("I", ["tensor(int64)"], "lengths"),
            ("F", ["tensor(float)"], "importance"),
        ],
        attributes=[
            OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, "factor of query · key"),
            OpSchema.Attribute("chunk", make_attribute("chunk", CHUNK), "queries at a time"),
            OpSchema.Attribute("importance", make_attribute("importance", 0), "1: give it as well"),
        ],
    )
)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    length: torch.Tensor | None = None,
    *,
    scale: float,
    chunk: int = CHUNK,
    importance: int = 0,
) -> tuple[torch.Tensor, ...]:
    """(output [B, Hq, N, d],) or, with ``importance``, (output, importance [B, N] fp32).

    query       [B, Hq, N, d] fp32, fp16 or bf16, key and value [B, Hkv, N, d] of the same dtype
    length      [B] int64; positions from there on are padding: no valid query sees them, their
                output means nothing (finite if the inputs are), and they count for no importance.
                Their queries and keys may hold anything, their values anything finite
    importance  1: the sum of CacheImportance over all valid queries; the output stays the same

    Raises ParameterError if shapes do not fit together, or length comes without importance=1.
    """
    outputs(query, key, value, length, scale=scale, chunk=chunk, importance=importance)
    output = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )
    if length is None:
        return (output,)
    slots = torch.arange(key.shape[2], device=key.device).expand(key.shape[0], -1)
    return output, *cache_importance.reference(query, key, slots, length, scale=scale, chunk=chunk)


def outputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    length: torch.Tensor | None = None,
    *,
    scale: float,  # noqa: ARG001  (shapes do not depend on it)
    chunk: int = CHUNK,
    importance: int = 0,
) -> Sequence[tuple[torch.dtype, Shape]]:
    """(dtype, shape) of the outputs. Raises ParameterError as ``reference`` does."""
    shapes = [tuple(t.shape) for t in (query, key, value)]
    if query.dim() != 4 or shapes[1] != shapes[2] or shapes[0][2:] != shapes[1][2:]:
        raise ParameterError(
            "CausalAttention: query [B, Hq, N, d], key and value [B, Hkv, N, d] do not fit: "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    check_heads(SCHEMA.name, query, key)
    if (length is not None) != (importance == 1):
        raise ParameterError("CausalAttention: importance=1, and it alone, takes length [B]")
    if chunk < 1:
        raise ParameterError(f"CausalAttention: chunk is {chunk}, at least 1 is needed")
    described: list[tuple[torch.dtype, Shape]] = [(query.dtype, query.shape)]
    if importance:
        described.append((torch.float32, (key.shape[0], key.shape[2])))
    return described


def function(attributes: Mapping[str, Attribute]) -> onnx.FunctionProto:
    """The op for ONNX Runtime; ``scale`` is read from the node, all else shapes the body."""
    chunk, scored = _variant(attributes)
    return attention_function(SCHEMA, scored, chunk=chunk)


def lowered(attributes: Mapping[str, Attribute], plugins: bool) -> onnx.FunctionProto:
    """Standard attention, for which TensorRT has a fused kernel, beside CacheImportance if scored.
    Without plugins the latter is a loop, and TensorRT-RTX 1.7 finds no kernel for attention in one
    network with loops, or crashes: then one loop gives both."""
    chunk, scored = _variant(attributes)
    if scored and not plugins:
        return attention_function(SCHEMA, scored, parts=PARTS)
    return lowered_attention(SCHEMA, chunk, scored)


def _variant(attributes: Mapping[str, Attribute]) -> tuple[int, bool]:
    return int(attributes.get("chunk", CHUNK)), attributes.get("importance", 0) == 1


def samples() -> Iterator[OpSample]:
    """Head layouts; prompts below, at and beyond whole chunks, down to one token; padding."""
    layouts = {
        # name: (lengths, query heads, key heads, head size, chunk)
        "multi-head": ([9], 4, 4, 32, 4),
        "grouped, ragged": ([11, 8, 1], 6, 2, 64, 4),
        "whole chunks": ([8, 5], 6, 2, 64, 4),
        "below one chunk": ([5, 7], 4, 1, 80, 128),
        "one token": ([1], 6, 2, 64, 4),
        "wide heads": ([6], 4, 2, 128, 3),
        "odd heads": ([6, 4], 3, 1, 96, 5),
    }
    for seed, (name, (lengths, heads, key_heads, width, chunk)) in enumerate(layouts.items()):
        random = torch.Generator().manual_seed(seed)
        length, extent = torch.tensor(lengths), max(lengths)
        query = torch.randn(len(lengths), heads, extent, width, generator=random) * 3
        key = torch.randn(len(lengths), key_heads, extent, width, generator=random)
        value = torch.randn(len(lengths), key_heads, extent, width, generator=random)
        for dtype in (torch.float32, torch.float16):
            data = query.to(dtype), key.to(dtype), value.to(dtype)
            padding = (torch.arange(extent) >= length[:, None])[:, None, :, None]
            label, attributes = f"{name}, {str(dtype)[6:]}", {"scale": width**-0.5, "chunk": chunk}
            yield OpSample(label, (*data, None), {**attributes, "importance": 0})
            scored = {**attributes, "importance": 1}
            yield OpSample(f"{label}, scored", (*data, length), scored, {"output": padding})


OP = Op(
    name="CausalAttention",
    schema=SCHEMA,
    axes={"query": "B h N d", "key": "B h N d", "value": "B h N d", "length": "B"},
    reference=reference,
    outputs=outputs,
    function=function,
    samples=samples,
    # Half precision: torch rounds inside, the function once, at the end.
    tolerance={torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2},
    lowered=lowered,
)
