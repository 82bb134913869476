"""Linear layers as nodes of their own: a product with a constant matrix in fp32.

The node is a function of the standard node, so that a kernel of our own can do it with weights that
it packs itself, for few rows and many.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx import helper

from lvlm.export.targets.passes.graph_edits import call, lowered_function

# x [..,K], weight [K,N] -> y [..,N]
LINEAR = lowered_function(
    "Linear", ["x", "weight"], [helper.make_node("MatMul", ["x", "weight"], ["y"])], "y"
)
# x [M,K], weight [N,K] -> y [M,N]
TRANSPOSED = lowered_function(
    "TransposedLinear",
    ["x", "weight"],
    [helper.make_node("Gemm", ["x", "weight"], ["y"], transB=1)],
    "y",
)


def use_linears(model: ir.Model) -> int:
    """Use them wherever a matrix of weights is the second factor and nothing is added; how many."""
    done = 0
    for node in model.graph:
        if not _has_weights(node):
            continue
        if node.op_type == "MatMul":
            call(model, node, LINEAR)
        elif node.op_type == "Gemm" and len(node.inputs) == 2 and _only_transposes(node):
            call(model, node, TRANSPOSED)
        else:
            continue
        done += 1
    return done


def _has_weights(node: ir.Node) -> bool:
    """True for two inputs or more of which the second is a matrix of weights in fp32."""
    weight = node.inputs[1] if node.domain == "" and len(node.inputs) > 1 else None
    if weight is None or not weight.is_initializer() or weight.const_value is None:
        return False
    tensor = weight.const_value
    return tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2


def _only_transposes(node: ir.Node) -> bool:
    attributes = node.attributes
    whole = attributes.get_float("alpha", 1.0) == 1 and attributes.get_int("transA", 0) == 0
    return whole and attributes.get_int("transB", 0) == 1
