"""``lvlm::CacheUpdate``: write new entries into a cache, in every row from an index of its own.

ONNX's TensorScatter (axis -2, mode linear) for TensorRT versions that do not import it; the plugin
works in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx
import torch
from onnx import helper
from onnx.defs import OpSchema

from lvlm.core.errors import ParameterError
from lvlm.export.ops.op import (
    DOMAIN,
    FLOATS,
    OPSET,
    VERSION,
    Attribute,
    Op,
    OpSample,
    Shape,
    register,
)

SCHEMA = register(
    OpSchema(
        "CacheUpdate",
        DOMAIN,
        VERSION,
        doc="The cache with each row's entries from its index on replaced: TensorScatter, axis -2.",
        inputs=[
            OpSchema.FormalParameter("cache", "T", "[B, H, C, d]"),
            OpSchema.FormalParameter("update", "T", "[B, H, S, d]: S <= C"),
            OpSchema.FormalParameter("index", "I", "[B]: each row's first slot, at most C - S"),
        ],
        outputs=[OpSchema.FormalParameter("updated", "T", "[B, H, C, d]")],
        type_constraints=[
            ("T", FLOATS, "keys or values"),
            ("I", ["tensor(int64)"], "indices"),
        ],
    )
)


def reference(
    cache: torch.Tensor, update: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor]:
    """(updated [B, H, C, d],): ``cache`` [B, H, C, d], in which ``update`` [B, H, S, d] of the same
    dtype replaces row b's slots index[b] … index[b] + S - 1, bit by bit; index [B] int64.

    Raises ParameterError if shapes do not fit together, or a row's entries not into the cache.
    """
    outputs(cache, update, index)
    entries, updated = update.shape[2], cache.clone()
    for row, first in enumerate(index.tolist()):
        if first < 0 or first + entries > cache.shape[2]:
            raise ParameterError(
                f"CacheUpdate: row {row} would write slots {first} to {first + entries - 1} of a "
                f"cache of {cache.shape[2]}"
            )
        # torch.scatter gives bf16 another NaN than it was.
        updated[row, :, first : first + entries] = update[row]
    return (updated,)


def outputs(
    cache: torch.Tensor, update: torch.Tensor, index: torch.Tensor
) -> Sequence[tuple[torch.dtype, Shape]]:
    """(dtype, shape) of the output. Raises ParameterError if shapes do not fit together."""
    old, new = cache.shape, update.shape
    fits = len(old) == len(new) == 4 and index.dim() == 1
    if not fits or (*old[:2], old[3]) != (*new[:2], new[3]) or index.shape[0] != old[0]:
        raise ParameterError(
            "CacheUpdate: cache [B, H, C, d], update [B, H, S, d] and index [B] do not fit: "
            f"{tuple(old)}, {tuple(new)} and {tuple(index.shape)}"
        )
    return [(cache.dtype, old)]


def function(attributes: Mapping[str, Attribute]) -> onnx.FunctionProto:  # noqa: ARG001
    """The op as the standard one, and nothing after it: its output must be the graph's, says
    TensorRT."""
    given, found = ([formal.name for formal in f] for f in (SCHEMA.inputs, SCHEMA.outputs))
    write = helper.make_node("TensorScatter", given, found, axis=-2, mode="linear")
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, SCHEMA.name, given, found, [write], opsets)


def samples() -> Iterator[OpSample]:
    """One entry and more, at the beginning, at the end, at another place in each row."""
    layouts = {
        # name: (indices, heads, capacity, entries, head size)
        "several entries": ([3, 0], 3, 12, 5, 80),
        "one entry": ([5], 4, 12, 1, 64),
        "ragged": ([7, 0, 15], 2, 16, 1, 128),
        "the last slots": ([9, 4], 2, 12, 3, 32),
        "all slots": ([0], 1, 7, 7, 96),
    }
    for seed, (name, (index, heads, capacity, entries, width)) in enumerate(layouts.items()):
        random = torch.Generator().manual_seed(seed)
        cache = torch.randn(len(index), heads, capacity, width, generator=random)
        update = torch.randn(len(index), heads, entries, width, generator=random)
        for dtype in (torch.float32, torch.float16):
            yield OpSample(
                f"{name}, {str(dtype)[6:]}",
                (cache.to(dtype), update.to(dtype), torch.tensor(index)),
            )


OP = Op(
    name="CacheUpdate",
    schema=SCHEMA,
    axes={"cache": "B h c d", "update": "B h S d", "index": "B"},
    reference=reference,
    outputs=outputs,
    function=function,
    samples=samples,
    tolerance={torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.0},
)
