"""MatMuls with quantized weights, as canonical graphs hold them: DequantizeLinear of numbers [N,K]
with scales and zero points [N, K / block], then Transpose and MatMul, or Gemm
(export/weights/steps/matmul_weights.py)."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from lvlm.core.errors import ExportError


def spread_of(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear whose result a MatMul or Gemm multiplies with."""
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    value = node.inputs[1]
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Transpose" and node.op_type == "MatMul":
        value = producer.inputs[0]
        producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def stored(value: ir.Value | None) -> ir.ExternalTensor:
    """The place of an initializer in the weights file."""
    tensor = None if value is None else value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        raise ExportError(f"{'' if value is None else value.name} does not lie in the weights file")
    return tensor


def readable(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    """The same by the whole path, to be read: relative to a folder it may not lie behind a link, as
    files in the hub's cache do."""
    path = Path(tensor.base_dir, tensor.location).absolute()
    return ir.ExternalTensor(
        str(path), tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name
    )


def extents(tensor: ir.ExternalTensor) -> tuple[int, int]:
    """Rows and columns."""
    rows, columns = tensor.shape.numpy()
    return rows, columns


def spread_rows(
    model: ir.Model, before: ir.Node, spread: ir.Node, start: int, stop: int
) -> ir.Value:
    """The weight [K,N] for a MatMul that is made of outputs [start, stop) of ``spread``, computed
    in front of ``before``: those lie one after the other in the weights file."""
    inputs = [_rows(model, value, start, stop) for value in spread.inputs]
    kept = {"axis": 1, "block_size": spread.attributes.get_int("block_size", 0)}
    part = ir.node("DequantizeLinear", inputs, attributes=kept)
    turned = ir.node("Transpose", [part.outputs[0]], attributes={"perm": [1, 0]})
    whole, columns = spread.outputs[0], extents(stored(spread.inputs[0]))[1]
    for node, shape in ((part, [stop - start, columns]), (turned, [columns, stop - start])):
        value = node.outputs[0]
        value.name, value.type = f"{whole.name}[{start}:{stop}]_{node.op_type}", whole.type
        value.shape = ir.Shape(shape)
    model.graph.insert_before(before, [part, turned])
    return turned.outputs[0]


def _rows(model: ir.Model, value: ir.Value | None, start: int, stop: int) -> ir.Value:
    """An initializer of the rows [start, stop) of another one, which are whole bytes, or all of
    the same byte."""
    whole = stored(value)
    name = f"{whole.name}[{start}:{stop}]"
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    columns = extents(whole)[1]
    bits = columns * whole.dtype.bitwidth
    shape = ir.Shape([stop - start, columns])
    made = ir.Value(name=name, type=ir.TensorType(whole.dtype), shape=shape)
    made.const_value = ir.ExternalTensor(
        whole.location,
        (whole.offset or 0) + start * bits // 8,
        -(-(stop - start) * bits // 8),
        whole.dtype,
        shape=shape,
        name=name,
        base_dir=whole.base_dir,
    )
    model.graph.initializers[name] = made
    return made
