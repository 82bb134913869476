"""``lvlm::CacheCompact``: shorten a KV cache to a budget per row.

evict            the protected and the most important positions stay (equal: lower index first);
                 sources: PrefixKV, arXiv 2412.03409, and LightVLM, arXiv 2509.00419
merge            the same positions stay as anchors; every other one goes to the nearest anchor by
                 index (a tie goes left), whose key and value become the plain mean over all that
                 came, itself included; source: Elastic Cache, arXiv 2407.18121
merge-reference  what Elastic Cache's released code does instead, for parity tests only

Survivors keep their order; what absorbs nothing is copied bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx.defs import OpSchema
from onnx.helper import make_attribute

from lvlm.core.discovery import nearest
from lvlm.core.errors import ParameterError
from lvlm.export.ops.cache_compact.function import compact_function
from lvlm.export.ops.cache_compact.samples import samples
from lvlm.export.ops.op import DOMAIN, FLOATS, VERSION, Op, Shape, register
from lvlm.export.ops.parts.input_checks import check_ranks

MODES = ("evict", "merge", "merge-reference")

SCHEMA = register(
    OpSchema(
        "CacheCompact",
        DOMAIN,
        VERSION,
        doc="Shorten a KV cache: the most important entries stay, the others go or merge.",
        inputs=[
            OpSchema.FormalParameter("key", "T", "[B, H, N, d]"),
            OpSchema.FormalParameter("value", "T", "[B, H, N, d]"),
            OpSchema.FormalParameter("importance", "F", "[B, N]"),
            OpSchema.FormalParameter("length", "I", "[B]: valid entries, the first of each row"),
            OpSchema.FormalParameter("budget", "I", "[B]: entries that stay, at most length"),
            OpSchema.FormalParameter("slots", "I", "[K]: 0 … K-1, K the largest budget, K <= N"),
        ],
        outputs=[
            OpSchema.FormalParameter("compact_key", "T", "[B, H, K, d], padding 0"),
            OpSchema.FormalParameter("compact_value", "T", "[B, H, K, d], padding 0"),
            OpSchema.FormalParameter("kept_index", "I", "[B, K]: rising, padding -1"),
            OpSchema.FormalParameter(
                "kept", "I", "[B]: budget, or -1 where a valid entry's importance is not finite"
            ),
        ],
        type_constraints=[
            ("T", FLOATS, "keys and values"),
            ("F", ["tensor(float)"], "importance"),
            ("I", ["tensor(int64)"], "indices and counts"),
        ],
        attributes=[
            OpSchema.Attribute("mode", make_attribute("mode", "evict"), ", ".join(MODES)),
            OpSchema.Attribute("sinks", make_attribute("sinks", 1), "first entries, protected"),
            OpSchema.Attribute("recent", make_attribute("recent", 1), "last entries, protected"),
        ],
    )
)


def reference(
    key: torch.Tensor,
    value: torch.Tensor,
    importance: torch.Tensor,
    length: torch.Tensor,
    budget: torch.Tensor,
    slots: torch.Tensor,
    *,
    mode: str = "evict",
    sinks: int = 1,
    recent: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(key [B, H, K, d], value [B, H, K, d], kept_index [B, K] int64, kept [B] int64).

    key and value [B, H, N, d] fp32, fp16 or bf16; importance [B, N] fp32; length and budget [B] and
    slots [K] int64. Padding may hold anything. Means are fp32. Importance that is not finite counts
    as 0, and ``kept`` tells. ``recent`` is 1 for merge-reference, where a budget one short of the
    length drops the first entry, as the released code does.

    Raises ParameterError for an unknown mode, a budget below the protected or beyond the valid
    entries, or counts and shapes that do not fit together.
    """
    outputs(key, value, importance, length, budget, slots, mode=mode, sinks=sinks, recent=recent)
    _check_counts(importance, length, budget, slots, mode, sinks, recent)
    batch, extent = key.shape[0], slots.shape[0]
    new_key, new_value = (t.new_zeros(*t.shape[:2], extent, t.shape[3]) for t in (key, value))
    kept_index = length.new_full((batch, extent), -1)
    kept = budget.clone()
    for row in range(batch):
        n, b = int(length[row]), int(budget[row])
        finite = importance[row, :n].isfinite()
        if not finite.all():
            kept[row] = -1
        score = importance[row, :n].where(finite, 0)
        if mode == "merge-reference":
            stay, anchors, sources = _as_released(score, b, sinks)
        else:
            stay = anchors = _most_important(score, b, sinks, recent)
            loose = torch.ones(n, dtype=torch.bool, device=key.device)
            loose[stay] = False
            sources = loose.nonzero().flatten() if mode == "merge" else stay[:0]
        kept_index[row, :b] = stay
        for old, new in ((key, new_key), (value, new_value)):
            new[row, :, :b] = _merged(old[row], anchors, sources)[:, stay]
    return new_key, new_value, kept_index, kept


def _most_important(score: torch.Tensor, budget: int, sinks: int, recent: int) -> torch.Tensor:
    """The protected and the most important of one row's valid positions, rising."""
    index = torch.arange(len(score), device=score.device)
    protected = (index < sinks) | (index >= len(score) - recent)
    ranked = score.masked_fill(protected, float("inf")).argsort(descending=True, stable=True)
    return ranked[:budget].sort().values


def _as_released(
    score: torch.Tensor, budget: int, sinks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(what stays, what absorbs, what is absorbed) in Elastic Cache's released code: a permutation
    is compared with a count as if it were ranks, and sources are not shifted by the sinks."""
    n = len(score)
    index = torch.arange(n, device=score.device)
    forget = n - 1 - budget
    if forget <= 0:
        return index[n - budget :], index[:0], index[:0]
    permutation = score[sinks : n - 1].argsort(stable=True)
    anchors = (permutation > forget).nonzero().flatten() + sinks
    sources = (permutation <= forget).nonzero().flatten()
    if not len(anchors):
        sources = sources[:0]
    return torch.cat((index[:sinks], anchors, index[n - 1 :])), anchors, sources


def _merged(states: torch.Tensor, anchors: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """``states`` [H, N, d] with each source [S] averaged into the nearest of the anchors [A]."""
    if not len(sources):
        return states
    middle = (anchors[1:] + anchors[:-1]) // 2  # the last position that goes left
    owner = torch.searchsorted(middle, sources)
    total = states[:, anchors].float().index_add(1, owner, states[:, sources].float())
    count = torch.bincount(owner, minlength=len(anchors)) + 1
    merged = states.clone()
    merged[:, anchors] = (total / count[:, None]).to(states.dtype)  # x / 1 is x
    return merged


def _check_counts(
    importance: torch.Tensor,
    length: torch.Tensor,
    budget: torch.Tensor,
    slots: torch.Tensor,
    mode: str,
    sinks: int,
    recent: int,
) -> None:
    if (length > importance.shape[1]).any() or (budget > length).any():
        raise ParameterError("CacheCompact: budget <= length <= N does not hold in every row")
    minimum = length.clamp(max=sinks + recent)
    if mode == "merge-reference":  # whose branch for one entry protects nothing
        minimum = torch.where(budget >= length - 1, 0, minimum)
    if (budget < minimum.clamp(min=1)).any():
        raise ParameterError(
            f"CacheCompact: a budget of {int(budget.min())} has no room for {sinks} first and "
            f"{recent} last entries"
        )
    if not budget.max() <= slots.shape[0] <= importance.shape[1]:
        raise ParameterError(
            f"CacheCompact: slots has {slots.shape[0]} entries; the largest budget is "
            f"{int(budget.max())}, of {importance.shape[1]} positions"
        )


def outputs(
    key: torch.Tensor,
    value: torch.Tensor,
    importance: torch.Tensor,
    length: torch.Tensor,
    budget: torch.Tensor,
    slots: torch.Tensor,
    *,
    mode: str = "evict",
    sinks: int = 1,
    recent: int = 1,
) -> Sequence[tuple[torch.dtype, Shape]]:
    """(dtype, shape) of the outputs. Raises ParameterError as ``reference`` does."""
    if mode not in MODES:
        raise nearest("compaction mode", mode, MODES)
    if sinks < 0 or recent < 0 or (mode == "merge-reference" and recent != 1):
        raise ParameterError(
            f"CacheCompact: sinks is {sinks} and recent {recent}; neither may be negative, and "
            "merge-reference protects 1 recent entry"
        )
    inputs = [
        ("key", key, (4,)),
        ("value", value, (4,)),
        ("importance", importance, (2,)),
        ("length", length, (1,)),
        ("budget", budget, (1,)),
        ("slots", slots, (1,)),
    ]
    check_ranks(SCHEMA.name, inputs)
    batch, heads, _, width = key.shape
    extent = slots.shape[0]
    return [
        (key.dtype, (batch, heads, extent, width)),
        (value.dtype, (batch, heads, extent, value.shape[3])),
        (torch.int64, (batch, extent)),
        (torch.int64, (batch,)),
    ]


OP = Op(
    name="CacheCompact",
    schema=SCHEMA,
    axes={
        "key": "B h N d",
        "value": "B h N d",
        "importance": "B N",
        "length": "B",
        "budget": "B",
        "slots": "K",
    },
    reference=reference,
    outputs=outputs,
    function=lambda attributes: compact_function(SCHEMA, attributes),
    samples=samples,
    # Half precision: one rounding of the mean, at most one unit in the last place.
    tolerance={torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
)
