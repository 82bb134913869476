"""``lvlm::CacheImportance``: the attention that each cached position receives from many queries.

Source: Elastic Cache (arXiv 2407.18121) and PrefixKV (arXiv 2412.03409) rank a prompt's entries by
the column sums of its attention, ``lightvlm`` by those of the most recent queries. The queries go
through in chunks: no more than ``chunk`` rows of attention exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx
import torch
from onnx.defs import OpSchema
from onnx.helper import make_attribute

from lvlm.core.errors import ParameterError
from lvlm.export.ops.op import DOMAIN, FLOATS, VERSION, Attribute, Op, OpSample, Shape, register
from lvlm.export.ops.parts.chunked_attention import importance_function
from lvlm.export.ops.parts.input_checks import check_heads, check_softcap

CHUNK = 128

SCHEMA = register(
    OpSchema(
        "CacheImportance",
        DOMAIN,
        VERSION,
        doc="Attention that each position receives, summed over queries, mean over heads.",
        inputs=[
            OpSchema.FormalParameter("query", "T", "[B, Hq, R, d]: rows, rotary embedding applied"),
            OpSchema.FormalParameter("key", "T", "[B, Hkv, N, d]: Hq a multiple of Hkv"),
            OpSchema.FormalParameter(
                "query_slot", "I", "[B, R]: index of each query's own key, -1: unused row"
            ),
            OpSchema.FormalParameter("length", "I", "[B]: valid keys, the first of each row"),
        ],
        outputs=[OpSchema.FormalParameter("importance", "F", "[B, N]: 0 where nothing attends")],
        type_constraints=[
            ("T", FLOATS, "queries and keys"),
            ("I", ["tensor(int64)"], "indices and lengths"),
            ("F", ["tensor(float)"], "importance"),
        ],
        attributes=[
            OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, "factor of query · key"),
            OpSchema.Attribute("chunk", make_attribute("chunk", CHUNK), "queries at a time"),
            OpSchema.Attribute("softcap", make_attribute("softcap", 0.0), "cap of logits, 0: none"),
            OpSchema.Attribute("parts", make_attribute("parts", 0), "if not 0, chunks instead"),
        ],
    )
)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    query_slot: torch.Tensor,
    length: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    chunk: int = CHUNK,
    parts: int = 0,
) -> tuple[torch.Tensor]:
    """Importance [B, N] fp32 of every position: a sum, not divided by the number of queries.

    query       [B, Hq, R, d] fp32, fp16 or bf16, key [B, Hkv, N, d] of the same dtype
    query_slot  [B, R] int64; row r sees keys 0 … query_slot; -1, or an index beyond the valid
                keys: an unused row, whatever it holds
    length      [B] int64; keys from there on are padding, whatever they hold
    scale       of the logits, usually d ** -0.5
    softcap     if not 0: logits x become softcap · tanh(x / softcap)
    chunk       most queries whose attention exists at a time
    parts       if not 0: the queries go in that many chunks instead, whatever their size, for an
                engine that has to know how many turns a loop takes

    Query head h reads key head h // (Hq / Hkv). What is not finite in a used query or a valid key
    leaves importance that is not finite. Raises ParameterError if shapes do not fit together.
    """
    outputs(query, key, query_slot, length, scale=scale, chunk=chunk, parts=parts)
    rows = query.shape[2]
    chunk = -(-rows // parts) if parts else chunk
    slots = torch.where(query_slot < length[:, None], query_slot, -1)
    keys = key.float().transpose(2, 3)
    importance = torch.zeros(key.shape[0], key.shape[2], device=key.device)
    for start in range(0, rows, chunk):
        some = slice(start, start + chunk)
        scaled = query[:, :, some].float() * scale
        importance += _received(scaled, keys, slots[:, some], softcap)
    return (importance / query.shape[1],)


def _received(
    query: torch.Tensor, keys: torch.Tensor, slots: torch.Tensor, softcap: float
) -> torch.Tensor:
    """[B, N] attention of these queries [B, Hq, c, d] to the keys [B, Hkv, d, N], summed."""
    batch, heads, rows, width = query.shape
    # Heads of a group go under each other: one product per key head, no repeated keys.
    logits = query.reshape(batch, keys.shape[1], -1, width) @ keys
    logits = logits.view(batch, heads, rows, -1)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = torch.arange(keys.shape[3], device=keys.device) > slots[:, None, :, None]
    attention = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
    # A row that sees nothing is all NaN until here.
    return attention.masked_fill_(hidden, 0).sum(dim=(1, 2))


def outputs(
    query: torch.Tensor,
    key: torch.Tensor,
    query_slot: torch.Tensor,
    length: torch.Tensor,
    *,
    scale: float,  # noqa: ARG001  (shapes do not depend on it)
    softcap: float = 0.0,
    chunk: int = CHUNK,
    parts: int = 0,
) -> Sequence[tuple[torch.dtype, Shape]]:
    """(dtype, shape) of the output. Raises ParameterError as ``reference`` does."""
    check_heads(SCHEMA.name, query, key)
    check_softcap(SCHEMA.name, softcap)
    if query_slot.dim() != 2 or length.dim() != 1:
        raise ParameterError("CacheImportance: query_slot is [B, R] and length [B]")
    if chunk < 1 or parts < 0:
        raise ParameterError(
            f"CacheImportance: chunk is {chunk}, at least 1 is needed; parts is {parts}, at least 0"
        )
    return [(torch.float32, (key.shape[0], key.shape[2]))]


def function(attributes: Mapping[str, Attribute]) -> onnx.FunctionProto:
    """The op as standard ops for these chunks and this cap; ``scale`` is read from the node."""
    chunk, parts = int(attributes.get("chunk", CHUNK)), int(attributes.get("parts", 0))
    return importance_function(SCHEMA, chunk, parts, float(attributes.get("softcap", 0)))


def samples() -> Iterator[OpSample]:
    """Head layouts, padding, unused rows, rows that see nothing; rows and chunks that do and do
    not come out even."""
    nan = float("nan")
    layouts = {
        # name: (lengths, query slots, query heads, key heads, head size, chunk; below 0: parts)
        "whole prompt, multi-head": ([9], [[*range(9)]], 4, 4, 32, 4),
        "whole prompt, grouped": ([8, 5], [[*range(8)]] * 2, 6, 2, 64, 4),
        "last queries": ([11, 7], [[8, 9, 10], [-1, 5, 6]], 4, 1, 80, 128),
        "out of order": ([7, 6], [[6, -1, 2, 0], [3, 5, -1, 4]], 4, 2, 96, 3),
        "in three parts": ([10, 8], [[*range(10)]] * 2, 6, 2, 64, -3),
        "at once": ([11, 7], [[8, 9, 10], [-1, 5, 6]], 6, 2, 64, -1),
        "no used row": ([5, 4], [[-1, -1], [3, 4]], 2, 2, 128, 2),
        "one query": ([1], [[0]], 2, 1, 32, 128),
        "capped": ([9, 6], [[*range(9)]] * 2, 4, 2, 32, 4),
        "capped, at once": ([11, 7], [[10, 8, 10], [-1, 5, 6]], 6, 2, 64, -1),
    }
    for seed, (name, (lengths, slots, heads, key_heads, width, chunk)) in enumerate(
        layouts.items()
    ):
        random = torch.Generator().manual_seed(seed)
        length, query_slot = torch.tensor(lengths), torch.tensor(slots)
        batch, rows = query_slot.shape
        query = torch.randn(batch, heads, rows, width, generator=random) * 3
        key = torch.randn(batch, key_heads, max(lengths) + 2, width, generator=random)
        unused = (query_slot < 0) | (query_slot >= length[:, None])
        query = query.masked_fill(unused[:, None, :, None], nan)
        padding = torch.arange(key.shape[2]) >= length[:, None]
        key = key.masked_fill(padding[:, None, :, None], nan)
        for dtype in (torch.float32, torch.float16):
            yield OpSample(
                f"{name}, {str(dtype)[6:]}",
                (query.to(dtype), key.to(dtype), query_slot, length),
                {
                    "scale": width**-0.5,
                    **({"chunk": chunk} if chunk > 0 else {"parts": -chunk}),
                    **({"softcap": 2.0} if "capped" in name else {}),
                },
            )


OP = Op(
    name="CacheImportance",
    schema=SCHEMA,
    axes={"query": "B h R d", "key": "B h N d", "query_slot": "B R", "length": "B"},
    reference=reference,
    outputs=outputs,
    function=function,
    samples=samples,
    # Everything is fp32 inside, whatever the dtype of the data.
    tolerance={torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6},
)
