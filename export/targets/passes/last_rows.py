"""The last block of a prefill computes what follows its attention for the last token alone: nobody
reads the other rows."""

from __future__ import annotations

import onnx_ir as ir

# Each row of the result depends on the same row of the inputs; constants aside.
ROW_BY_ROW = frozenset(
    {"Add", "Mul", "Sigmoid", "Gelu", "Tanh", "Cast", "MatMul", "RMSNormalization", "Split"}
)


def keep_last_rows(model: ir.Model) -> int:
    """Take the rows [B,1,D] that are read of the last state [B,N,D] earlier; how many nodes see
    fewer rows."""
    picks = [n for n in model.graph if n.op_type == "GatherElements" and _axis(n) == 1]
    if len(picks) != 1 or (state := picks[0].inputs[0]) is None or len(list(state.uses())) != 1:
        return 0
    pick = picks[0]
    index = pick.inputs[1]
    fewer = _fewer(model.graph, pick)
    if index is None or not fewer:
        return 0
    first = ir.node("Constant", [], attributes={"value_ints": [0]})
    rows = ir.node("Gather", [index, first.outputs[0]], attributes={"axis": 2})  # [B,1,1]
    model.graph.insert_after(pick, [first, rows])
    rows.outputs[0].name = "last_row"
    taken: dict[ir.Value, ir.Value] = {}
    for node in fewer:
        for place, value in enumerate(node.inputs):
            if value is None or not _has_rows(value) or value.producer() in fewer:
                continue
            if value not in taken:
                gather = ir.node("GatherND", [value, rows.outputs[0]], attributes={"batch_dims": 1})
                gather.outputs[0].name, gather.outputs[0].type = f"{value.name}_last", value.type
                if value.shape is not None:
                    gather.outputs[0].shape = ir.Shape([value.shape[0], 1, value.shape[2]])
                model.graph.insert_after(rows, gather)
                taken[value] = gather.outputs[0]
            node.replace_input_with(place, taken[value])
        for output in node.outputs:
            if output.shape is not None:
                output.shape = ir.Shape([output.shape[0], 1, *output.shape[2:]])
    pick.outputs[0].replace_all_uses_with(state)
    model.graph.remove(pick, safe=True)
    model.graph.sort()
    return len(fewer)


def _fewer(graph: ir.Graph, pick: ir.Node) -> dict[ir.Node, None]:
    """Nodes whose results nobody but ``pick`` and one another read."""
    found: dict[ir.Node, None] = {pick: None}
    for node in reversed(graph):
        if node.op_type not in ROW_BY_ROW or node.domain != "" or not _by_rows(node):
            continue
        uses = [use for output in node.outputs for use in output.uses()]
        inside = all(u.node in found and (u.node is not pick or u.idx == 0) for u in uses)
        if uses and inside and not any(output.is_graph_output() for output in node.outputs):
            found[node] = None
    del found[pick]
    return found


def _by_rows(node: ir.Node) -> bool:
    """True for states [B,N,D], not along N, constants without rows."""
    if not all(_has_rows(output) for output in node.outputs):
        return False
    if node.op_type in ("Split", "RMSNormalization") and _axis(node) != -1:
        return False
    given = [x for x in node.inputs if x is not None]
    extents = {x.shape[:2] for x in (*given, *node.outputs) if _has_rows(x) and x.shape is not None}
    if len(extents) > 1:  # one row for all
        return False
    others = [x for x in given if not _has_rows(x)]
    if node.op_type == "MatMul":  # a quantized weight is computed from several constants
        weights = all(x.shape is not None and len(x.shape) == 2 for x in others)
        return weights and _has_rows(given[0])
    return all(x.is_initializer() or _constant(x) for x in others)


def _constant(value: ir.Value) -> bool:
    made = value.producer()
    return made is not None and made.op_type == "Constant"


def _has_rows(value: ir.Value) -> bool:
    if value.is_initializer():
        return False
    if value.shape is None:  # the exporter tells none inside a function of torch's
        made = value.producer()
        inputs = () if made is None or made.op_type not in ROW_BY_ROW else made.inputs[:1]
        return any(x is not None and _has_rows(x) for x in inputs)
    return len(value.shape) == 3


def _axis(node: ir.Node) -> int:
    return node.attributes.get_int("axis", 0 if node.op_type in ("Split", "GatherElements") else -1)
