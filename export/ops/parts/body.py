"""Writing the body of an ONNX function: ``g.Add(x, y)`` appends a node, gives its output's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lvlm.export.ops.op import DOMAIN, OPSET, VERSION, Attribute

Value = str  # the name of a tensor


class Body:
    """The nodes of a function, in order. Every name is unique, so values are never overwritten.

    prefix  of every name; a graph inside a node (Scan) sees the names around it, and has its own
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []

    def node(self, op: str, *inputs: Value, count: int = 1, **attributes: Any) -> tuple[Value, ...]:
        """Append a standard op with ``count`` outputs and give their names."""
        outputs = tuple(f"{self.prefix}{op}_{len(self.nodes)}_{i}" for i in range(count))
        self.nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs

    def __getattr__(self, op: str) -> Callable[..., Value]:
        """A standard op of one output, by its name."""
        if not op[0].isupper():
            raise AttributeError(op)
        return lambda *inputs, **attributes: self.node(op, *inputs, **attributes)[0]

    def const(self, value: Any, dtype: Any = np.int64) -> Value:
        """A constant; int64 unless told."""
        return self.Constant(value=numpy_helper.from_array(np.asarray(value, dtype)))

    def attribute(self, name: str, field: str, kind: int) -> Value:
        """A scalar that takes the value of the node's attribute ``name``."""
        (output,) = self.node("Constant")
        self.read_attribute(name, field, kind)
        return output

    def read_attribute(self, name: str, field: str, kind: int) -> None:
        """The last node's attribute ``field`` takes the value of the attribute ``name``."""
        reference = onnx.AttributeProto(name=field, ref_attr_name=name, type=kind)  # type: ignore[arg-type]
        self.nodes[-1].attribute.append(reference)

    def dim(self, value: Value, axis: int) -> Value:
        """The extent of one axis, int64 [1]."""
        return self.Shape(value, start=axis, end=axis + 1)

    def arange(self, extent: Value) -> Value:
        """0 … extent - 1, int64 [extent]."""
        return self.Range(self.const(0), self.Squeeze(extent), self.const(1))

    def function(
        self,
        schema: onnx.defs.OpSchema,
        outputs: Sequence[Value],
        built_for: Mapping[str, Attribute],
        required: Sequence[str] = (),
        inputs: int | None = None,
    ) -> onnx.FunctionProto:
        """The finished function, with the schema's formal names.

        outputs    all of them, or the first ones where this variant gives no more
        built_for  attributes that shaped the body, recorded as the function's defaults
        required   attributes that the body reads from the node
        inputs     how many of the formal inputs this variant takes (all, unless told): TensorRT's
                   parser wants a node and its function to have equally many, none of them empty
        """
        formals = schema.outputs[: len(outputs)]
        for value, formal in zip(outputs, formals, strict=True):
            self.nodes.append(helper.make_node("Identity", [value], [formal.name]))
        return helper.make_function(
            DOMAIN,
            schema.name,
            [formal.name for formal in schema.inputs[:inputs]],
            [formal.name for formal in formals],
            self.nodes,
            [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
            attributes=list(required),
            attribute_protos=[helper.make_attribute(k, v) for k, v in built_for.items()],
            doc_string=f"{DOMAIN}::{schema.name} version {VERSION} as standard ops",
        )
