"""``lvlm::GatedDeltaRule``: linear attention whose state forgets, and corrects what it recalls.

Source: Gated Delta Networks (arXiv 2412.06464). A head's state S [dk, dv] maps keys to values. Each
token lets it decay, reads what it holds for the token's key, and moves that towards the token's
value by ``beta``; the query then reads the state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx.defs import OpSchema
from onnx.helper import make_attribute

from lvlm.core.errors import ParameterError
from lvlm.export.ops.gated_delta_rule.function import CHUNK, function, lowered
from lvlm.export.ops.gated_delta_rule.samples import samples
from lvlm.export.ops.op import DOMAIN, FLOATS, VERSION, Op, Shape, register

SCHEMA = register(
    OpSchema(
        "GatedDeltaRule",
        DOMAIN,
        VERSION,
        doc="Linear attention with a decaying state that is corrected towards each token's value.",
        inputs=[
            OpSchema.FormalParameter("query", "T", "[B, N, Hk, dk], scaled"),
            OpSchema.FormalParameter("key", "T", "[B, N, Hk, dk], of length 1 or less"),
            OpSchema.FormalParameter("value", "T", "[B, N, Hv, dv]: Hv a multiple of Hk"),
            OpSchema.FormalParameter("decay", "F", "[B, N, Hv]: logarithms, 0 or less"),
            OpSchema.FormalParameter("beta", "F", "[B, N, Hv]: between 0 and 1"),
            OpSchema.FormalParameter("state", "F", "[B, Hv, dk, dv] before these tokens"),
            OpSchema.FormalParameter("length", "I", "[B]: valid tokens, the first of each row"),
        ],
        outputs=[
            OpSchema.FormalParameter("output", "T", "[B, N, Hv, dv]"),
            OpSchema.FormalParameter("final", "F", "[B, Hv, dk, dv] after each row's last token"),
        ],
        type_constraints=[
            ("T", FLOATS, "data"),
            ("F", ["tensor(float)"], "gates and states"),
            ("I", ["tensor(int64)"], "lengths"),
        ],
        attributes=[
            OpSchema.Attribute("chunk", make_attribute("chunk", CHUNK), "tokens at a time")
        ],
    )
)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    length: torch.Tensor,
    *,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [B, N, Hv, dv] of the data's dtype, final [B, Hv, dk, dv] fp32), token by token.

    query   [B, N, Hk, dk] fp32, fp16 or bf16, key likewise, value [B, N, Hv, dv] of the same dtype;
            value head h goes with key head h // (Hv / Hk)
    decay   [B, N, Hv] fp32, of which the exponential is the factor of the state; beta likewise
    state   [B, Hv, dk, dv] fp32, in which a row's first token finds it
    length  [B] int64; tokens from there on leave the state as it is, whatever finite they hold, and
            their output means nothing
    chunk   tokens that implementations may take together

    Everything is fp32 inside. Raises ParameterError if shapes do not fit together.
    """
    outputs(query, key, value, decay, beta, state, length, chunk=chunk)
    groups = value.shape[2] // key.shape[2]
    q, k = (x.float().repeat_interleave(groups, dim=2) for x in (query, key))
    found = []
    for token in range(key.shape[1]):
        new, read = step(
            q[:, token], k[:, token], value[:, token], decay[:, token], beta[:, token], state
        )
        found.append(read)
        state = torch.where((token < length)[:, None, None, None], new, state)
    return torch.stack(found, dim=1).to(query.dtype), state


def step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state [B, Hv, dk, dv] after one token, and what its query reads of it [B, Hv, dv]: fp32.

    query, key [B, Hv, dk], value [B, Hv, dv]; decay, beta [B, Hv] and the state before in fp32.
    """
    key, query = key.float()[..., None], query.float()[..., None]
    state = state * decay.exp()[..., None, None]
    wrong = value.float() - (state * key).sum(-2)
    state = state + key * (wrong * beta[..., None])[..., None, :]
    return state, (state * query).sum(-2)


def outputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    length: torch.Tensor,
    *,
    chunk: int = CHUNK,
) -> Sequence[tuple[torch.dtype, Shape]]:
    """(dtype, shape) of the outputs. Raises ParameterError as ``reference`` does."""
    gates = value.shape[:-1]
    fits = query.shape == key.shape and key.dim() == value.dim() == 4
    fits = fits and key.shape[:2] == value.shape[:2] and decay.shape == beta.shape == gates
    wanted = (value.shape[0], *value.shape[2:3], key.shape[-1], value.shape[-1])
    if not fits or tuple(state.shape) != wanted or tuple(length.shape) != (value.shape[0],):
        given = query, key, value, decay, beta, state, length
        raise ParameterError(
            "GatedDeltaRule: query and key [B, N, Hk, dk], value [B, N, Hv, dv], decay and beta "
            "[B, N, Hv], state [B, Hv, dk, dv] and length [B] do not fit: "
            f"{', '.join(str(tuple(x.shape)) for x in given)}"
        )
    if value.shape[2] % key.shape[2]:
        raise ParameterError(
            f"GatedDeltaRule: {value.shape[2]} value heads are no multiple of {key.shape[2]} key "
            "heads"
        )
    if chunk < 1 or chunk & (chunk - 1):
        raise ParameterError(f"GatedDeltaRule: chunk is {chunk}, a power of two is needed")
    return [(query.dtype, value.shape), (torch.float32, state.shape)]


OP = Op(
    name="GatedDeltaRule",
    schema=SCHEMA,
    axes={
        "query": "B N h d",
        "key": "B N h d",
        "value": "B N h d",
        "decay": "B N h",
        "beta": "B N h",
        "state": "B h d e",
        "length": "B",
    },
    reference=reference,
    outputs=outputs,
    function=lambda attributes: function(SCHEMA, attributes),
    samples=samples,
    # Everything is fp32 inside; sums of logarithms are what rounds. Half precision: one rounding of
    # the output.
    tolerance={torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    lowered=lambda attributes, _: lowered(SCHEMA, attributes),
)
