"""``lvlm::TokenImportance``: how much attention each position receives from chosen queries.

Source: LightVLM, arXiv 2509.00419, which ranks image tokens by the attention of the block before
a merging stage. Only the chosen query rows are recomputed, so fused attention stays in use. The
last prompt token alone, or every text token after the image: both are a choice of query rows.
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
from lvlm.export.ops.parts.chunked_attention import capped
from lvlm.export.ops.parts.input_checks import check_heads, check_softcap

SCHEMA = register(
    OpSchema(
        "TokenImportance",
        DOMAIN,
        VERSION,
        doc="Attention that each position receives, mean over the chosen queries and all heads.",
        inputs=[
            OpSchema.FormalParameter("query", "T", "[B, Hq, R, d]: rows, rotary embedding applied"),
            OpSchema.FormalParameter("key", "T", "[B, Hkv, N, d]: Hq a multiple of Hkv"),
            OpSchema.FormalParameter(
                "query_index", "I", "[B, R]: sequence index of each query row, -1 = unused row"
            ),
            OpSchema.FormalParameter(
                "image_id", "I", "[B, N]: -1 padding, 0 text, m >= 1 the m-th image"
            ),
        ],
        outputs=[OpSchema.FormalParameter("importance", "F", "[B, N]: 0 where nothing attends")],
        type_constraints=[
            ("T", FLOATS, "queries and keys"),
            ("I", ["tensor(int64)"], "indices"),
            ("F", ["tensor(float)"], "importance"),
        ],
        attributes=[
            OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, "factor of query · key"),
            OpSchema.Attribute("softcap", make_attribute("softcap", 0.0), "cap of logits, 0: none"),
        ],
    )
)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    query_index: torch.Tensor,
    image_id: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor]:
    """Importance [B, N] fp32 of every position.

    query        [B, Hq, R, d] fp32, fp16 or bf16, key [B, Hkv, N, d] of the same dtype
    query_index  [B, R] int64; row r attends to positions up to its index; -1: not used
    image_id     [B, N] int64; negative: padding, which nothing attends to
    scale        of the logits, usually d ** -0.5
    softcap      if not 0: logits x become softcap · tanh(x / softcap)

    A batch row without a used query gets zeros. Query head h reads key head h // (Hq / Hkv).
    Raises ParameterError if shapes do not fit together.
    """
    _check(query, key, query_index, image_id, softcap)
    heads, positions = query.shape[1], torch.arange(key.shape[2], device=key.device)
    key = key.float().repeat_interleave(heads // key.shape[1], dim=1)
    logits = (query.float() @ key.transpose(2, 3)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    seen = (positions <= query_index[:, :, None]) & (image_id >= 0)[:, None]  # [B, R, N]
    logits = logits.masked_fill(~seen[:, None], float("-inf"))
    attention = logits.softmax(dim=-1).masked_fill(~seen[:, None], 0)  # rows that see nothing: 0
    used = (query_index >= 0).sum(dim=1, keepdim=True).clamp(min=1)
    return (attention.sum(dim=(1, 2)) / (used * heads),)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    query_index: torch.Tensor,
    image_id: torch.Tensor,
    softcap: float,
) -> None:
    check_heads(SCHEMA.name, query, key)
    check_softcap(SCHEMA.name, softcap)
    if query_index.dim() != 2 or image_id.dim() != 2:
        raise ParameterError("TokenImportance: query_index is [B, R] and image_id [B, N]")


def outputs(
    query: torch.Tensor,
    key: torch.Tensor,
    query_index: torch.Tensor,
    image_id: torch.Tensor,
    *,
    scale: float,  # noqa: ARG001  (shapes do not depend on it)
    softcap: float = 0.0,
) -> Sequence[tuple[torch.dtype, Shape]]:
    """(dtype, shape) of the output."""
    _check(query, key, query_index, image_id, softcap)
    return [(torch.float32, (key.shape[0], key.shape[2]))]


def function(attributes: Mapping[str, Attribute]) -> onnx.FunctionProto:
    """The op as standard ops for this cap; ``scale`` is read from the node."""
    softcap = float(attributes.get("softcap", 0))
    g = Body()
    f32 = onnx.TensorProto.FLOAT
    batch, heads, rows = (g.dim("query", i) for i in range(3))
    key_heads, positions, width = (g.dim("key", i) for i in range(1, 4))
    scale = g.attribute("scale", "value_float", onnx.AttributeProto.FLOAT)

    # Heads of a group go under each other: one product per key head, no repeated keys.
    query = g.Mul(g.Cast("query", to=f32), scale)
    query = g.Reshape(query, g.Concat(batch, key_heads, g.const([-1]), width, axis=0))
    logits = g.MatMul(query, g.Transpose(g.Cast("key", to=f32), perm=[0, 1, 3, 2]))
    logits = g.Reshape(logits, g.Concat(batch, heads, rows, positions, axis=0))
    logits = capped(g, logits, softcap)

    index = g.Unsqueeze("query_index", g.const([2]))
    valid = g.Unsqueeze(g.GreaterOrEqual("image_id", g.const(0)), g.const([1]))
    seen = g.And(g.LessOrEqual(g.arange(positions), index), valid)
    seen = g.Unsqueeze(seen, g.const([1]))  # [B, 1, R, N]
    # A finite lowest value: a row that sees nothing gives no NaN, and is zeroed right after.
    logits = g.Where(seen, logits, g.const(-3.4e38, "float32"))
    attention = g.Where(seen, g.Softmax(logits, axis=-1), g.const(0, "float32"))

    used = g.Cast(g.GreaterOrEqual("query_index", g.const(0)), to=f32)
    used = g.Max(g.ReduceSum(used, g.const([1]), keepdims=1), g.const(1, "float32"))
    total = g.ReduceSum(attention, g.const([1, 2]), keepdims=0)
    mean = g.Div(total, g.Mul(used, g.Cast(heads, to=f32)))
    built_for = {"softcap": softcap} if softcap else {}
    return g.function(SCHEMA, [mean], built_for, required=["scale"])


def samples() -> Iterator[OpSample]:
    """Head layouts, padding on both sides, unused rows and rows that see nothing."""
    text, image, end = [0] * 3, [1] * 7, [0] * 2
    plain = [text + image + end]
    ragged = [[*plain[0], -1, -1, -1], [0, *image, 0, *[2] * 4, 0, -1]]
    left = [[-1, -1, -1, *plain[0]], [0, *image, 0, *[2] * 4, 0, 0]]
    layouts = {
        "last row, multi-head": (plain, [[11]], 4, 4, 32),
        "last row, one key head": (plain, [[11]], 4, 1, 64),
        "ragged, grouped": (ragged, [[11], [13]], 6, 2, 80),
        "left padding, grouped": (left, [[14], [14]], 4, 2, 128),
        "several rows, one unused": (ragged, [[10, 11, -1], [8, -1, 13]], 4, 2, 96),
        "no used row": (ragged, [[-1, -1], [13, -1]], 2, 2, 32),
        "sees only padding": (left, [[1, 2], [0, 1]], 2, 1, 32),
        "capped": (ragged, [[10, 11, -1], [8, -1, 13]], 4, 2, 32),
    }
    for seed, (name, (ids, index, heads, key_heads, width)) in enumerate(layouts.items()):
        random = torch.Generator().manual_seed(seed)
        image_id, query_index = torch.tensor(ids), torch.tensor(index)
        batch, rows = query_index.shape
        query = torch.randn(batch, heads, rows, width, generator=random) * 3
        key = torch.randn(batch, key_heads, image_id.shape[1], width, generator=random)
        for dtype in (torch.float32, torch.float16):
            yield OpSample(
                f"{name}, {str(dtype)[6:]}",
                (query.to(dtype), key.to(dtype), query_index, image_id),
                {"scale": width**-0.5} | ({"softcap": 2.0} if name == "capped" else {}),
            )


OP = Op(
    name="TokenImportance",
    schema=SCHEMA,
    axes={"query": "B h R d", "key": "B h N d", "query_index": "B R", "image_id": "B N"},
    reference=reference,
    outputs=outputs,
    function=function,
    samples=samples,
    # Everything is fp32 inside, whatever the dtype of the data.
    tolerance={torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6},
)
