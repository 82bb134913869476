"""``lvlm::TokenMerge``: keep the important image tokens, fold some of the others into them.

Source: LightVLM, arXiv 2509.00419 (pyramid token merging); what the paper's abstract leaves open is
defined here. Per row and image, its tokens are ranked by importance (equal: lower index first; a
last valid token that is an image token: first of all). The first ``keep`` stay; then by ``merge``:

recycle  the last ``recycle`` of those that stay are centres. A discarded token goes to the centre
         of its image with the highest cosine similarity (equal: the more important centre), and a
         centre absorbs the ``absorb`` most similar of its tokens (equal: lower index)
nearest  every token that stays is a centre and absorbs all that go to it
illava   centres as for recycle, but each takes the ``absorb`` discarded tokens of its image with
         the largest dot products (equal: lower index), which several centres may share
drop     nothing is absorbed

A centre's hidden state becomes the importance-weighted mean over itself and what it absorbed; with
illava (arXiv 2412.06263) half its own and half the mean of what it took, weighted by the softmax of
the dot products over the root of the width. A token that several took maps to the most similar.
Survivors keep order and position; everything that absorbs nothing is copied bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx.defs import OpSchema
from onnx.helper import make_attribute

from lvlm.core.discovery import nearest
from lvlm.core.errors import ParameterError
from lvlm.export.ops.op import DOMAIN, FLOATS, VERSION, Op, Shape, register
from lvlm.export.ops.parts.input_checks import check_ranks
from lvlm.export.ops.token_merge.function import EPSILON, token_merge_function
from lvlm.export.ops.token_merge.samples import samples

RULES = ("recycle", "nearest", "illava", "drop")
WITH_CENTRES = ("recycle", "illava")  # rules that take recycle and recycle_slots

SCHEMA = register(
    OpSchema(
        "TokenMerge",
        DOMAIN,
        VERSION,
        doc="Shorten a sequence: of each image's tokens the most important stay, others merge.",
        inputs=[
            OpSchema.FormalParameter("hidden", "T", "[B, N, D]"),
            OpSchema.FormalParameter("importance", "F", "[B, N], finite, at least 0"),
            OpSchema.FormalParameter(
                "image_id", "I", "[B, N]: -1 padding, 0 text, m >= 1 the m-th image, m <= M"
            ),
            OpSchema.FormalParameter("positions", "I", "[B, N], or [3, B, N] with M-RoPE"),
            OpSchema.FormalParameter("keep", "I", "[B, M]: tokens of each image that stay"),
            OpSchema.FormalParameter("keep_slots", "I", "[K]: 0 … K-1, K the largest keep"),
            OpSchema.FormalParameter("out_slots", "I", "[Nout]: 0 … Nout-1, longest row after"),
            OpSchema.FormalParameter(
                "recycle",
                "I",
                "[B, M]: how many of those are centres; with merge=recycle or illava",
                param_option=OpSchema.FormalParameterOption.Optional,
            ),
            OpSchema.FormalParameter(
                "recycle_slots",
                "I",
                "[R]: 0 … R-1, R the largest recycle; with merge=recycle or illava",
                param_option=OpSchema.FormalParameterOption.Optional,
            ),
        ],
        outputs=[
            OpSchema.FormalParameter("merged", "T", "[B, Nout, D], padding 0"),
            OpSchema.FormalParameter("merged_positions", "I", "like positions, padding 0"),
            OpSchema.FormalParameter("merged_image_id", "I", "[B, Nout], padding -1"),
            OpSchema.FormalParameter(
                "map", "I", "[B, N]: new index, of the centre if absorbed, -1 if gone"
            ),
        ],
        type_constraints=[
            ("T", FLOATS, "hidden states"),
            ("F", ["tensor(float)"], "importance"),
            ("I", ["tensor(int64)"], "indices and counts"),
        ],
        attributes=[
            OpSchema.Attribute("merge", make_attribute("merge", "recycle"), ", ".join(RULES)),
            OpSchema.Attribute("absorb", make_attribute("absorb", 5), "most that a centre absorbs"),
        ],
    )
)


def reference(
    hidden: torch.Tensor,
    importance: torch.Tensor,
    image_id: torch.Tensor,
    positions: torch.Tensor,
    keep: torch.Tensor,
    keep_slots: torch.Tensor,
    out_slots: torch.Tensor,
    recycle: torch.Tensor | None = None,
    recycle_slots: torch.Tensor | None = None,
    *,
    merge: str = "recycle",
    absorb: int = 5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden [B, Nout, D], positions […, B, Nout], image_id [B, Nout], map [B, N] old → new).

    hidden [B, N, D] fp32, fp16 or bf16; importance [B, N] fp32; all else int64: image_id [B, N],
    positions [B, N] or [3, B, N], keep and recycle [B, M] (recycle < keep, so that a protected
    token is no centre), keep_slots [K], recycle_slots [R], out_slots [Nout], whose extents are at
    least the largest keep, recycle (and 1) and row after merging. Only ``recycle`` and ``illava``
    take recycle and recycle_slots. Products and means are fp32; a zero weight sum means the plain
    mean.

    Raises ParameterError for an unknown rule, or counts and shapes that do not fit together.
    """
    outputs(hidden, importance, image_id, positions, keep, keep_slots, out_slots, recycle,
            recycle_slots, merge=merge, absorb=absorb)  # fmt: skip
    _check_counts(image_id, keep, keep_slots, out_slots, recycle, recycle_slots)
    batch, length = image_id.shape
    new_length = out_slots.shape[0]
    merged = hidden.new_zeros(batch, new_length, hidden.shape[2])
    new_positions = positions.new_zeros(*positions.shape[:-1], new_length)
    new_image_id = image_id.new_full((batch, new_length), -1)
    mapping = image_id.new_full((batch, length), -1)

    for row in range(batch):
        state, weight = hidden[row].clone(), importance[row]
        stays = image_id[row] == 0
        goes_to = torch.arange(length, device=hidden.device)  # absorbed: its centre
        last = (image_id[row] >= 0).nonzero().flatten()[-1:]
        rank_by = weight.index_fill(0, last, float("inf"))
        for image in range(keep.shape[1]):
            tokens = (image_id[row] == image + 1).nonzero().flatten()
            ranked = tokens[rank_by[tokens].argsort(descending=True, stable=True)]
            k = int(keep[row, image])
            kept, discarded = ranked[:k], ranked[k:].sort().values  # equally similar: lower index
            stays[kept] = True
            centres = kept if recycle is None else kept[k - int(recycle[row, image]) :]
            if merge == "drop" or not len(centres) or not len(discarded):
                continue
            if merge == "illava":
                dots = hidden[row, centres].float() @ hidden[row, discarded].float().T
                taken = _nearest_few(dots, absorb)
                state[centres] = _halves(hidden[row], centres, discarded, dots, taken)
                owner, moved = dots.where(taken, float("-inf")).argmax(dim=0), taken.any(dim=0)
                goes_to[discarded[moved]] = centres[owner[moved]]
                continue
            cosine = _cosine(hidden[row, centres], hidden[row, discarded])
            owner = cosine.argmax(dim=0)
            taken = owner == torch.arange(len(centres), device=hidden.device)[:, None]
            if merge == "recycle":
                taken &= _nearest_few(cosine.where(taken, float("-inf")), absorb)
            touched, moved = taken.any(dim=1), taken.any(dim=0)
            means = _means(hidden[row], weight, centres, discarded, taken)
            state[centres[touched]] = means[touched].to(state.dtype)
            goes_to[discarded[moved]] = centres[owner[moved]]

        new_index = torch.where(stays, stays.cumsum(0) - 1, -1)
        mapping[row] = new_index[goes_to]
        kept = stays.nonzero().flatten()
        merged[row, : len(kept)] = state[kept]
        new_positions[..., row, : len(kept)] = positions[..., row, kept]
        new_image_id[row, : len(kept)] = image_id[row, kept]
    return merged, new_positions, new_image_id, mapping


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Similarity [A, B] of [A, D] and [B, D]."""
    a, b = a.float(), b.float()
    norm_a, norm_b = (torch.linalg.vector_norm(x, dim=1).clamp(min=EPSILON) for x in (a, b))
    cosine: torch.Tensor = a @ b.T / norm_a[:, None] / norm_b
    return cosine


def _nearest_few(similarity: torch.Tensor, absorb: int) -> torch.Tensor:
    """The ``absorb`` largest of each row [C, X] bool; equal: lower index."""
    order = similarity.argsort(dim=1, descending=True, stable=True)
    taken: torch.Tensor = order.argsort(dim=1) < absorb  # the inverse: each token's place
    return taken


def _halves(
    states: torch.Tensor,
    centres: torch.Tensor,
    discarded: torch.Tensor,
    dots: torch.Tensor,
    taken: torch.Tensor,
) -> torch.Tensor:
    """Centres [C, D], half and half with the softmax-weighted mean of what each takes."""
    share = (dots / states.shape[1] ** 0.5).where(taken, float("-inf")).softmax(dim=1)
    mean = share @ states[discarded].float()
    half: torch.Tensor = (states[centres].float() + mean) / 2
    return half.to(states.dtype)


def _means(
    states: torch.Tensor,
    weight: torch.Tensor,
    centres: torch.Tensor,
    discarded: torch.Tensor,
    taken: torch.Tensor,
) -> torch.Tensor:
    """Weighted means [C, D] fp32 of each centre and the discarded it takes ([C, X] bool)."""
    inside = torch.cat((torch.ones_like(centres, dtype=torch.bool)[:, None], taken), dim=1)
    share = torch.cat((weight[centres, None], weight[discarded].expand(taken.shape)), dim=1)
    share = share.where(inside, 0)
    share = share.where(share.sum(dim=1, keepdim=True) > 0, inside.float())
    share = share / share.sum(dim=1, keepdim=True)
    own = share[:, :1] * states[centres].float()
    return own + share[:, 1:] @ states[discarded].float()


def _check_counts(
    image_id: torch.Tensor,
    keep: torch.Tensor,
    keep_slots: torch.Tensor,
    out_slots: torch.Tensor,
    recycle: torch.Tensor | None,
    recycle_slots: torch.Tensor | None,
) -> None:
    numbers = torch.arange(1, keep.shape[1] + 1, device=keep.device)
    present = (image_id[:, :, None] == numbers).sum(1)
    longest = ((image_id == 0).sum(1) + keep.sum(1)).max()
    if (keep < 0).any() or (keep > present).any():
        raise ParameterError("TokenMerge: keep exceeds the image tokens that are present")
    if recycle is not None and ((recycle < 0).any() or (recycle > keep).any()):
        raise ParameterError("TokenMerge: recycle exceeds keep")
    slots = [("keep_slots", keep_slots, keep.max()), ("out_slots", out_slots, longest)]
    if recycle is not None and recycle_slots is not None:
        slots.append(("recycle_slots", recycle_slots, recycle.max()))
    for name, slot, needed in slots:
        if slot.shape[0] < max(1, int(needed)):
            raise ParameterError(f"TokenMerge: {name} has {slot.shape[0]} slots of {int(needed)}")


def outputs(
    hidden: torch.Tensor,
    importance: torch.Tensor,
    image_id: torch.Tensor,
    positions: torch.Tensor,
    keep: torch.Tensor,
    keep_slots: torch.Tensor,
    out_slots: torch.Tensor,
    recycle: torch.Tensor | None = None,
    recycle_slots: torch.Tensor | None = None,
    *,
    merge: str = "recycle",
    absorb: int = 5,
) -> Sequence[tuple[torch.dtype, Shape]]:
    """(dtype, shape) of the outputs. Raises ParameterError as ``reference`` does."""
    if merge not in RULES:
        raise nearest("merge rule", merge, RULES)
    if absorb < 1:
        raise ParameterError(f"TokenMerge: absorb is {absorb}, at least 1 is needed")
    if (recycle is not None, recycle_slots is not None) != (merge in WITH_CENTRES,) * 2:
        raise ParameterError(
            "TokenMerge: merge=recycle and illava alone take recycle and recycle_slots"
        )
    inputs: list[tuple[str, torch.Tensor | None, tuple[int, ...]]] = [
        ("hidden", hidden, (3,)),
        ("importance", importance, (2,)),
        ("image_id", image_id, (2,)),
        ("positions", positions, (2, 3)),
        ("keep", keep, (2,)),
        ("keep_slots", keep_slots, (1,)),
        ("out_slots", out_slots, (1,)),
        ("recycle", recycle, (2,)),
        ("recycle_slots", recycle_slots, (1,)),
    ]
    check_ranks(SCHEMA.name, inputs)
    batch, length, width = hidden.shape
    new_length = out_slots.shape[0]
    return [
        (hidden.dtype, (batch, new_length, width)),
        (torch.int64, (*positions.shape[:-1], new_length)),
        (torch.int64, (batch, new_length)),
        (torch.int64, (batch, length)),
    ]


OP = Op(
    name="TokenMerge",
    schema=SCHEMA,
    axes={
        "hidden": "B N d",
        "importance": "B N",
        "image_id": "B N",
        "positions": "B N",
        "keep": "B M",
        "keep_slots": "K",
        "out_slots": "NOUT",
        "recycle": "B M",
        "recycle_slots": "R",
    },
    reference=reference,
    outputs=outputs,
    function=lambda attributes: token_merge_function(SCHEMA, attributes),
    samples=samples,
    # Half precision: one rounding of the merged state, at most one unit in the last place.
    tolerance={torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
)
