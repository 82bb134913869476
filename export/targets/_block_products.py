"""Products with quantized weights as ONNX Runtime's MatMulNBits, which reads the packed blocks.

The canonical graph spreads a weight with DequantizeLinear at every run. MatMulNBits saves that; how
it computes (``accuracy_level``) follows measurements on a CPU without VNNI (docs/quantization.md):
rounding the few rows of decode to 8 bits makes them up to four times faster, for the many rows of
prefill fp32 is as fast and exact, and with int8 weights spreading beats MatMulNBits there.
"""

from __future__ import annotations

import onnx_ir as ir

from lvlm.export.quantized_products import BLOCKS
from lvlm.runtime.errors import ExportError

MICROSOFT = "com.microsoft"
FP32, INT8 = 1, 4  # accuracy levels


def use_block_products(model: ir.Model) -> int:
    """Exchange products over dequantized weights for MatMulNBits where that is faster; returns how
    many there were. Precondition: weights as quantized_products.py has them, uint4 or uint8."""
    replaced = 0
    for node in list(model.graph):
        spread = _spread(node)
        if spread is None or node.inputs[0] is None:
            continue
        numbers, scales = spread.inputs[:2]
        if numbers is None or scales is None or numbers.shape is None:
            raise ExportError(f"{spread.name} has no weight of known shape")
        bits = 4 if numbers.dtype == ir.DataType.UINT4 else 8
        few = _few_rows(node.inputs[0])
        if bits == 8 and not few:
            continue
        outputs, inputs = numbers.shape.numpy()
        block = spread.attributes.get_int("block_size", 0)
        attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block}
        product = ir.node(
            "MatMulNBits",
            [node.inputs[0], _blocks(model, numbers, bits, block), scales],
            attributes=attributes | {"accuracy_level": INT8 if few else FP32},
            domain=MICROSOFT,
        )
        _replace(model, node, product)
        replaced += 1
    if replaced:
        model.opset_imports[MICROSOFT] = 1
    _drop_unused(model)
    return replaced


def _spread(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear whose result is the second input of a product."""
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    value = node.inputs[1]
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Transpose" and node.op_type == "MatMul":
        value = producer.inputs[0]
        producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def _few_rows(x: ir.Value) -> bool:
    """Whether each sequence of the batch has one row: [B,K] or [B,1,K]."""
    if x.shape is None:
        raise ExportError(f"the shape of {x.name} is unknown")
    return len(x.shape) == 2 or x.shape[-2] == 1


def _blocks(model: ir.Model, numbers: ir.Value, bits: int, block: int) -> ir.Value:
    """The initializer of the same bytes as uint8 [N, K / block, bytes of a block]."""
    name = f"{numbers.name}{BLOCKS}"
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = numbers.const_value
    if not isinstance(tensor, ir.ExternalTensor) or numbers.shape is None:
        raise ExportError(f"{numbers.name} does not lie in the weights file")
    outputs, inputs = numbers.shape.numpy()
    shape = ir.Shape([outputs, inputs // block, block * bits // 8])
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), shape=shape)
    value.const_value = ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, ir.DataType.UINT8, shape=shape, name=name
    )
    model.graph.initializers[name] = value
    return value


def _replace(model: ir.Model, node: ir.Node, product: ir.Node) -> None:
    """``product`` in ``node``'s place, with an Add where that is a Gemm with a bias."""
    nodes, old = [product], node.outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        product.outputs[0].name = f"{old.name}_product"
        product.outputs[0].shape, product.outputs[0].type = old.shape, old.type
        nodes.append(ir.node("Add", [product.outputs[0], bias]))
    new = nodes[-1].outputs[0]
    new.shape, new.type = old.shape, old.type
    model.graph.insert_before(node, nodes)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, f"{old.name}_replaced"
    model.graph.remove(node, safe=True)


def _drop_unused(model: ir.Model) -> None:
    for node in reversed(list(model.graph)):
        if node.op_type in ("DequantizeLinear", "Transpose") and not any(
            list(output.uses()) or output.is_graph_output() for output in node.outputs
        ):
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not list(value.uses()) and not value.is_graph_output():
            del model.graph.initializers[name]
