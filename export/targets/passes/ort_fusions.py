"""Several nodes as one of ONNX Runtime's own operators (domain com.microsoft), which its CPU
provider has kernels for. Every pass takes an onnx-ir model, changes it in place and says how often.
"""

from __future__ import annotations

import onnx_ir as ir

MICROSOFT = "com.microsoft"


def fuse_skip_normalization(model: ir.Model) -> int:
    """Add of two states, then RMSNormalization: SkipSimplifiedLayerNormalization gives both."""
    fused = 0
    for add in list(model.graph):
        if add.op_type != "Add" or add.domain != "" or not _same_shape(add):
            continue
        total = add.outputs[0]
        norms = [use.node for use in total.uses() if _normalizes(use.node, total)]
        if not norms:
            continue
        norm = norms[0]
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        node = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, norm.inputs[1]],
            attributes={"epsilon": epsilon},
            domain=MICROSOFT,
            num_outputs=4,
        )
        model.graph.insert_before(add, node)
        node.outputs[1].name = node.outputs[2].name = ""
        take_place(norm.outputs[0], node.outputs[0])
        take_place(total, node.outputs[3])
        model.graph.remove([norm, add], safe=True)
        fused += 1
    return fused


def _same_shape(add: ir.Node) -> bool:
    first, second = add.inputs
    if first is None or second is None or first.shape is None or second.shape is None:
        return False
    constant = first.is_initializer() or second.is_initializer()
    return not constant and len(first.shape) in (2, 3) and first.shape == second.shape


def _normalizes(node: ir.Node, value: ir.Value) -> bool:
    return (
        node.op_type == "RMSNormalization"
        and node.domain == ""
        and node.inputs[0] is value
        and (weight := node.inputs[1]) is not None
        and weight.is_initializer()  # what is computed may be so after the sum
        and node.attributes.get_int("axis", -1) == -1
    )


def fuse_silu(model: ir.Model) -> int:
    """x * Sigmoid(x): QuickGelu with alpha 1, in one pass over the data."""
    fused = 0
    for sigmoid in list(model.graph):
        if sigmoid.op_type != "Sigmoid" or sigmoid.domain != "":
            continue
        uses = list(sigmoid.outputs[0].uses())
        data = sigmoid.inputs[0]
        if len(uses) != 1 or uses[0].node.op_type != "Mul" or data not in uses[0].node.inputs:
            continue
        product = uses[0].node
        node = ir.node("QuickGelu", [data], attributes={"alpha": 1.0}, domain=MICROSOFT)
        model.graph.insert_before(product, node)
        take_place(product.outputs[0], node.outputs[0])
        model.graph.remove([product, sigmoid], safe=True)
        fused += 1
    return fused


def take_place(old: ir.Value, new: ir.Value) -> None:
    """``new`` under the name and type of ``old``, wherever that was read."""
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, f"{old.name}_replaced"
