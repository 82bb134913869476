"""``lvlm::CacheDequantize``: int8 entries of a cache as the numbers they stand for.

See cache_quantize.py, whose inverse this is but for the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx
import torch
from onnx.defs import OpSchema
from onnx.helper import make_attribute

from lvlm.core.errors import ParameterError
from lvlm.export.ops import cache_quantize
from lvlm.export.ops.op import DOMAIN, FLOATS, VERSION, Attribute, Op, OpSample, Shape, register
from lvlm.export.ops.parts.body import Body
from lvlm.export.ops.parts.input_checks import check_ranks
from lvlm.export.ops.parts.int8_entries import dequantize, dequantized

TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
}
NUMBERS = {dtype: int(number) for number, dtype in TYPES.items()}  # ``to`` of a dtype

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
        type_constraints=[("T", FLOATS, "keys or values"), ("Q", ["tensor(int8)"], "entries")],
        attributes=[
            OpSchema.Attribute(
                "to", make_attribute("to", int(onnx.TensorProto.FLOAT)), "type of the output"
            )
        ],
    )
)


def reference(
    entries: torch.Tensor, *, to: int = int(onnx.TensorProto.FLOAT)
) -> tuple[torch.Tensor]:
    """(states [B, H, n, d],) of ``entries`` [B, H, n, d + 1] int8: products in fp32, then rounded
    to the type that ``to`` numbers as ONNX does (1 fp32, 10 fp16, 16 bf16).

    Raises ParameterError for another rank or type.
    """
    outputs(entries, to=to)
    return (dequantized(entries, TYPES[to]),)


def outputs(
    entries: torch.Tensor, *, to: int = int(onnx.TensorProto.FLOAT)
) -> Sequence[tuple[torch.dtype, Shape]]:
    """(dtype, shape) of the output. Raises ParameterError as ``reference`` does."""
    check_ranks(SCHEMA.name, [("entries", entries, (4,))])
    if to not in TYPES:
        raise ParameterError(f"CacheDequantize: to is {to}; give 1 (fp32), 10 (fp16) or 16 (bf16)")
    return [(TYPES[to], (*entries.shape[:3], entries.shape[3] - 1))]


def function(attributes: Mapping[str, Attribute]) -> onnx.FunctionProto:
    """The op as standard ops, for one type of output."""
    g, to = Body(), int(attributes.get("to", onnx.TensorProto.FLOAT))
    return g.function(SCHEMA, [g.Cast(dequantize(g, "entries"), to=to)], {**attributes, "to": to})


def samples() -> Iterator[OpSample]:
    """Entries that CacheQuantize's samples give, and every scale."""
    for sample in cache_quantize.samples():
        (states,) = sample.inputs
        assert states is not None
        entries = cache_quantize.reference(states)[0]
        yield OpSample(sample.name, (entries,), {"to": NUMBERS[states.dtype]})
    numbers = torch.arange(-127, 128, 2).expand(1, 1, 256, -1)
    scales = torch.arange(-128, 128)[None, None, :, None]
    yield OpSample("every scale", (torch.cat([numbers, scales], dim=3).to(torch.int8),))


OP = Op(
    name="CacheDequantize",
    schema=SCHEMA,
    axes={"entries": "B h N e"},
    reference=reference,
    outputs=outputs,
    function=function,
    samples=samples,
    tolerance={torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.0},
    lowered=lambda attributes, _: function(attributes),
)
