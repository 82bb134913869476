"""MatMuls with several weights side by side, taken apart again.

TensorRT-RTX 1.7 fails on some graphs with them (Myelin: "uses before defs", or the builder ends the
process). Each part reads its columns of the stored weight, which the builder folds; of a quantized
weight they are rows, which are read from where they lie.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lvlm.export.targets.passes.quantized_linears import spread_of, spread_rows


def split_linears(model: ir.Model) -> None:
    """Turn every Split of a MatMul with a constant (and bias) into MatMuls with the parts."""
    for split in list(model.graph):
        if split.op_type != "Split" or split.domain or len(split.inputs) < 1:
            continue
        result = split.inputs[0]
        last = result.producer() if result is not None else None
        bias = None
        if last is not None and last.op_type == "Add":
            bias = next((v for v in last.inputs if v is not None and v.is_initializer()), None)
            matmul = next((v for v in last.inputs if v is not bias), None)
            last = matmul.producer() if matmul is not None else None
        if last is None or last.op_type != "MatMul":
            continue
        rows, weight = last.inputs
        spread = spread_of(last)
        if weight is None or not (weight.is_initializer() or spread is not None):
            continue
        start = 0
        for out in list(split.outputs):
            assert out.shape is not None
            stop = start + int(out.shape[-1])  # type: ignore[arg-type]
            if spread is None:
                part = _part(model, split, weight, start, stop, 1)
            else:
                part = spread_rows(model, split, spread, start, stop)
            new = _node(model, split, "MatMul", [rows, part])
            if bias is not None:
                new = _node(model, split, "Add", [new, _part(model, split, bias, start, stop, 0)])
            new.shape, new.name = out.shape, f"{out.name}_apart"
            if out.dtype is not None:
                new.dtype = out.dtype
            out.replace_all_uses_with(new)
            start = stop
        model.graph.remove(split, safe=True)


def _part(
    model: ir.Model, before: ir.Node, whole: ir.Value, start: int, stop: int, axis: int
) -> ir.Value:
    bounds = []
    for name, number in (("start", start), ("stop", stop), ("axis", axis)):
        label = f"{whole.name}_{start}_{name}"
        value = ir.Value(
            name=label, const_value=ir.tensor(np.array([number], np.int64), name=label)
        )
        value.dtype, value.shape = ir.DataType.INT64, ir.Shape([1])
        model.graph.register_initializer(value)
        bounds.append(value)
    return _node(model, before, "Slice", [whole, *bounds])


def _node(
    model: ir.Model, before: ir.Node, kind: str, inputs: list[ir.Value | None] | list[ir.Value]
) -> ir.Value:
    node = ir.Node("", kind, inputs, num_outputs=1)
    model.graph.insert_before(before, node)
    node.outputs[0].name = f"{kind}_{before.outputs[0].name}_{len(model.graph)}"
    return node.outputs[0]
