"""``lvlm::CacheDequantize``: int8 entries of a cache as the numbers they stand for, in fp32.

See cache_quantize.py, whose inverse this is but for the rounding. One type of output: a kernel is
found by the types of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx
import torch
from onnx.defs import OpSchema

from lvlm.export.ops import cache_quantize
from lvlm.export.ops.op import DOMAIN, VERSION, Attribute, Op, OpSample, Shape, register
from lvlm.export.ops.parts.body import Body
from lvlm.export.ops.parts.input_checks import check_ranks
from lvlm.export.ops.parts.int8_entries import dequantize, dequantized

SCHEMA = register(
    OpSchema(
        "CacheDequantize",
        DOMAIN,
        VERSION,
        doc="Entries of 8 bits as the numbers they stand for.",
        inputs=[
            OpSchema.FormalParameter("entries", "Q", "[B, H, n, d + 1]: numbers, then the scale")
        ],
        outputs=[OpSchema.FormalParameter("states", "T", "[B, H, n, d]")],
        type_constraints=[
            ("T", ["tensor(float)"], "keys or values"),
            ("Q", ["tensor(int8)"], "entries"),
        ],
    )
)


def reference(entries: torch.Tensor) -> tuple[torch.Tensor]:
    """(states [B, H, n, d] fp32,) of ``entries`` [B, H, n, d + 1] int8.

    Raises ParameterError for another rank.
    """
    outputs(entries)
    return (dequantized(entries),)


def outputs(entries: torch.Tensor) -> Sequence[tuple[torch.dtype, Shape]]:
    """(dtype, shape) of the output. Raises ParameterError as ``reference`` does."""
    check_ranks(SCHEMA.name, [("entries", entries, (4,))])
    return [(torch.float32, (*entries.shape[:3], entries.shape[3] - 1))]


def function(attributes: Mapping[str, Attribute]) -> onnx.FunctionProto:
    """The op as standard ops."""
    g = Body()
    return g.function(SCHEMA, [dequantize(g, "entries")], attributes)


def samples() -> Iterator[OpSample]:
    """Entries that CacheQuantize's samples give, and every scale; of finite numbers."""
    for sample in cache_quantize.samples():
        (states,) = sample.inputs
        assert states is not None
        (entries,) = cache_quantize.reference(states)
        if dequantized(entries).isfinite().all():
            yield OpSample(sample.name, (entries,))
    numbers = torch.arange(-127, 128, 2).expand(1, 1, 255, -1)
    scales = torch.arange(-128, 127)[None, None, :, None]
    yield OpSample("every scale", (torch.cat([numbers, scales], dim=3).to(torch.int8),))


OP = Op(
    name="CacheDequantize",
    schema=SCHEMA,
    axes={"entries": "B h N e"},
    reference=reference,
    outputs=outputs,
    function=function,
    samples=samples,
    tolerance={torch.float32: 0.0},
    lowered=lambda attributes, _: function(attributes),
)
