"""MatMuls with quantized weights as ONNX Runtime's MatMulNBits, which reads the packed blocks.

The canonical graph spreads a weight with DequantizeLinear at every run. MatMulNBits saves that; how
it computes (``accuracy_level``) follows trials on a CPU without VNNI (docs/notes/quantization.md):
rounding the few rows of decode to 8 bits makes them up to four times faster; for the many rows of
prefill fp32 is as fast, and exact. Many rows by weights of 8 bits are a function of it, for which
there is a kernel of our own.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import helper

from lvlm.core.errors import ExportError
from lvlm.export.targets.passes.graph_edits import LOWERED_DOMAIN
from lvlm.export.targets.passes.ort_fusions import MICROSOFT, take_place
from lvlm.export.targets.passes.quantized_linears import spread_of, stored
from lvlm.export.weights.quantization import BLOCKS_SUFFIX, ZERO_POINTS_SUFFIX

FP32, INT8 = 1, 4  # accuracy levels
ATTRIBUTES = ("K", "N", "bits", "block_size", "accuracy_level")


def has_quantized_weights(path: Path) -> bool:
    return any(node.op_type == "DequantizeLinear" for node in ir.load(path).graph)


def use_block_linears(model: ir.Model) -> int:
    """Exchange MatMuls over dequantized weights for MatMulNBits where that is faster; how many.

    Precondition: weights as quantize_linears.py has them. What spread them stays, unused.
    """
    replaced = 0
    for node in list(model.graph):
        spread = spread_of(node)
        if spread is None or node.inputs[0] is None:
            continue
        numbers, scales, zeros = spread.inputs[:3]
        if numbers is None or scales is None or numbers.shape is None:
            raise ExportError(f"{spread.name} has no weight of known shape")
        bits = 4 if numbers.dtype == ir.DataType.UINT4 else 8
        few = _few_rows(node.inputs[0])
        outputs, inputs = numbers.shape.numpy()
        block = spread.attributes.get_int("block_size", 0)
        attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block}
        dims = [outputs, inputs // block, block * bits // 8]
        given = [node.inputs[0], _as_bytes(model, numbers, dims), scales]
        if zeros is not None and str(zeros.name).endswith(ZERO_POINTS_SUFFIX):
            given.append(_as_bytes(model, zeros, [outputs, inputs // block * bits // 8]))
        # Of 8 bits MatMulNBits spreads all weights in fp32 at every run; of 4 it has kernels
        kernel = bits == 8 and not few and node.inputs[0].dtype == ir.DataType.FLOAT
        name = _function(model, len(given) > 3) if kernel else "MatMulNBits"
        matmul = ir.node(
            name,
            given,
            attributes=attributes | {"accuracy_level": INT8 if few else FP32},
            domain=LOWERED_DOMAIN if kernel else MICROSOFT,
        )
        _replace(model, node, matmul)
        replaced += 1
    return replaced


def block_linear(zeroed: bool) -> onnx.FunctionProto:
    """MatMulNBits as a function, so that a kernel of our own can do it."""
    inputs = ["x", "numbers", "scales", *(["zeros"] if zeroed else [])]
    node = helper.make_node("MatMulNBits", inputs, ["y"], domain=MICROSOFT)
    for name in ATTRIBUTES:
        kind = onnx.AttributeProto.INT
        node.attribute.append(onnx.AttributeProto(name=name, ref_attr_name=name, type=kind))
    opsets = [helper.make_opsetid(MICROSOFT, 1)]
    name = "ZeroedBlockLinear" if zeroed else "BlockLinear"
    return helper.make_function(
        LOWERED_DOMAIN, name, inputs, ["y"], [node], opsets, attributes=list(ATTRIBUTES)
    )


def _function(model: ir.Model, zeroed: bool) -> str:
    """Its name, with the function in the model."""
    function = ir.serde.deserialize_function(block_linear(zeroed))
    model.functions.setdefault(function.identifier(), function)
    model.opset_imports[LOWERED_DOMAIN] = 1
    return function.name


def _few_rows(x: ir.Value) -> bool:
    """True where each sequence of the batch has one row: [B,K] or [B,1,K]."""
    if x.shape is None:
        raise ExportError(f"the shape of {x.name} is unknown")
    return len(x.shape) == 2 or x.shape[-2] == 1


def _as_bytes(model: ir.Model, value: ir.Value, dims: list[int]) -> ir.Value:
    """The initializer of the same bytes as uint8 of ``dims``."""
    name = f"{value.name}{BLOCKS_SUFFIX}"
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = stored(value)
    shape = ir.Shape(dims)
    made = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), shape=shape)
    made.const_value = ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, ir.DataType.UINT8, shape=shape, name=name
    )
    model.graph.initializers[name] = made
    return made


def _replace(model: ir.Model, node: ir.Node, matmul: ir.Node) -> None:
    """``matmul`` in ``node``'s place, with an Add where that is a Gemm with a bias."""
    nodes, old = [matmul], node.outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        linear = matmul.outputs[0]
        linear.name, linear.shape, linear.type = f"{old.name}_matmul", old.shape, old.type
        nodes.append(ir.node("Add", [linear, bias]))
    model.graph.insert_before(node, nodes)
    take_place(old, nodes[-1].outputs[0])
    model.graph.remove(node, safe=True)
