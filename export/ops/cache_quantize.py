"""``lvlm::CacheQuantize``: keys or values as int8 entries of a cache, each with a scale of its own.

One scale for a token and head, as caches of 8 bits commonly have (KIVI, arXiv 2402.02750, section
2, calls it per-token quantization); the form is that of parts/int8_entries.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx
import torch
from onnx.defs import OpSchema

from lvlm.export.ops.op import DOMAIN, FLOATS, VERSION, Attribute, Op, OpSample, Shape, register
from lvlm.export.ops.parts.body import Body
from lvlm.export.ops.parts.input_checks import check_ranks
from lvlm.export.ops.parts.int8_entries import quantize, quantized

SCHEMA = register(
    OpSchema(
        "CacheQuantize",
        DOMAIN,
        VERSION,
        doc="Keys or values in 8 bits, with a scale behind each.",
        inputs=[OpSchema.FormalParameter("states", "T", "[B, H, n, d]")],
        outputs=[
            OpSchema.FormalParameter("entries", "Q", "[B, H, n, d + 1]: numbers, then the scale")
        ],
        type_constraints=[("T", FLOATS, "keys or values"), ("Q", ["tensor(int8)"], "entries")],
    )
)


def reference(states: torch.Tensor) -> tuple[torch.Tensor]:
    """(entries [B, H, n, d + 1] int8,): keys or values ``states`` [B, H, n, d] fp32, fp16 or bf16.

    The step of an entry's numbers is the smallest of 2 ^ (scale / 8), scale from -128 to 126, that
    holds the largest of them as 127.49 or less. Where none does, or a number is not finite, the
    scale is 127, which stands for NaN.
    """
    outputs(states)
    return (quantized(states),)


def outputs(states: torch.Tensor) -> Sequence[tuple[torch.dtype, Shape]]:
    """(dtype, shape) of the output. Raises ParameterError for another rank."""
    check_ranks(SCHEMA.name, [("states", states, (4,))])
    return [(torch.int8, (*states.shape[:3], states.shape[3] + 1))]


def function(attributes: Mapping[str, Attribute]) -> onnx.FunctionProto:
    """The op as standard ops."""
    g = Body()
    return g.function(SCHEMA, [quantize(g, "states")], attributes)


def samples() -> Iterator[OpSample]:
    """Sizes of numbers from none to what fp16 does not hold; at and beside the borders of steps."""
    borders = torch.tensor([2.0 ** (k / 8) * 127.49 for k in range(-24, 24)], dtype=torch.float64)
    layouts = {
        # name: (batch, heads, entries, head size, factor)
        "ragged sizes": (2, 3, 5, 64, 10.0 ** torch.arange(-4.0, 1)[:, None]),
        "one entry": (1, 2, 1, 96, torch.tensor(0.1)),
        "zeros": (1, 1, 2, 32, torch.tensor(0.0)),
        "borders": (1, 1, 48, 80, borders[:, None]),
        "wide heads": (1, 2, 3, 128, torch.tensor(30.0)),
    }
    for seed, (name, (*sizes, factor)) in enumerate(layouts.items()):
        random = torch.Generator().manual_seed(seed)
        states = torch.randn(sizes, generator=random).double()
        states = states / states.abs().amax(-1, keepdim=True) * factor
        for dtype in (torch.float32, torch.float16):
            yield OpSample(f"{name}, {str(dtype)[6:]}", (states.to(dtype),))
    odd = torch.ones(1, 2, 4, 32)
    odd[0, 0, :, 7] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    odd[0, 1, :, 31] = torch.tensor([-3e38, 7.03e6, 7.02e6, 8.0])  # held up to 7.026e6
    yield OpSample("beyond the largest step, and not finite", (odd,))
    yield OpSample("not finite, float16", (odd.to(torch.float16),))


OP = Op(
    name="CacheQuantize",
    schema=SCHEMA,
    axes={"states": "B h N d"},
    reference=reference,
    outputs=outputs,
    function=function,
    samples=samples,
    tolerance={torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.0},
    lowered=lambda attributes, _: function(attributes),
)
