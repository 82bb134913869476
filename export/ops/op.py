"""An ``lvlm::`` op: one contract, checked four ways.

An op file holds an ``OP`` of this type. The torch reference is the meaning; the ONNX function makes
the op run anywhere without a custom library; a kernel or plugin (plugins_trt/) makes it fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch

DOMAIN = "lvlm"
VERSION = 1
OPSET = 24  # of the standard ops in function bodies and graphs
FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]  # of data, in schemas

Attribute = int | float | str
Tensors = tuple[torch.Tensor, ...]
Shape = Sequence[Any]  # int or torch.SymInt


def register(schema: onnx.defs.OpSchema) -> onnx.defs.OpSchema:
    """Make the schema known to onnx's checker; a module that is imported again changes nothing."""
    if not onnx.defs.has(schema.name, schema.domain):
        onnx.defs.register_schema(schema)
    return schema


@dataclass(frozen=True)
class OpSample:
    """Inputs and attributes for one check of an op.

    None stands for an optional input left out; those come last. ``unspecified`` says, for outputs
    by name, where they mean nothing (bool, True) and need only be finite.
    """

    name: str
    inputs: Sequence[torch.Tensor | None]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    unspecified: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """The contract of one op.

    axes       axis names of every input, aligned at the right ("B N d"): a capital varies from
               call to call, a small letter is fixed within one graph
    reference  torch, batched, eager; the meaning of the op
    outputs    (dtype, shape) of every output from inputs and attributes, less optional ones that
               these do not ask for; shapes may be symbolic
    function   the body as standard ops, for the given attributes
    samples    inputs every implementation is checked on
    tolerance  largest |difference| / max(1, largest |reference|), by dtype of the data
    lowered    the body for TensorRT where that of ``function`` is not for it, for the given
               attributes and whether lvlm ops are plugins there; lvlm ops may occur in it
    """

    name: str
    schema: onnx.defs.OpSchema
    axes: Mapping[str, str]
    reference: Callable[..., Tensors]
    outputs: Callable[..., Sequence[tuple[torch.dtype, Shape]]]
    function: Callable[[Mapping[str, Attribute]], onnx.FunctionProto]
    samples: Callable[[], Iterator[OpSample]]
    tolerance: Mapping[torch.dtype, float]
    lowered: Callable[[Mapping[str, Attribute], bool], onnx.FunctionProto] | None = None

    def __call__(self, *inputs: torch.Tensor | None, **attributes: Attribute) -> Tensors:
        """Run the reference (or what ``computed_by`` gives), or, while a graph is exported, leave
        one node in it.

        ``torch.export`` counts too: its program is what ``torch.onnx.export`` is then given.
        """
        if not (torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting()):
            compute = _computed_by.get()
            if compute is not None:
                return compute(self, inputs, attributes)
            return self.reference(*inputs, **attributes)
        described = self.outputs(*inputs, **attributes)
        while inputs[-1] is None:  # an empty name at the end is one input too many to TensorRT
            inputs = inputs[:-1]
        return tuple(
            torch.onnx.ops.symbolic_multi_out(
                f"{DOMAIN}::{self.name}",
                inputs,
                dict(attributes),
                dtypes=[dtype for dtype, _ in described],
                shapes=[shape for _, shape in described],
                version=VERSION,
            )
        )


Compute = Callable[[Op, Sequence[torch.Tensor | None], Mapping[str, Attribute]], Tensors]
_computed_by: ContextVar[Compute | None] = ContextVar("computed_by", default=None)


@contextmanager
def computed_by(compute: Compute) -> Iterator[None]:
    """Within: ``compute(op, inputs, attributes)`` gives every op's outputs instead of its torch
    reference, so that a recipe's own code runs on kernels."""
    token = _computed_by.set(compute)
    try:
        yield
    finally:
        _computed_by.reset(token)
