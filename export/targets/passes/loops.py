"""Scan as Loop, for parsers whose Scan cannot read values from around it."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from lvlm.export.targets.passes.ort_fusions import take_place


def scans_to_loops(model: ir.Model) -> int:
    """Every Scan of the main graph, forwards over first axes as ours all are; how many."""
    scans = [n for n in model.graph if n.domain == "" and n.op_type == "Scan"]
    for number, node in enumerate(scans):
        _to_loop(model.graph, node, f"loop_{number}")
    return len(scans)


def _to_loop(graph: ir.Graph, node: ir.Node, prefix: str) -> None:
    body = node.attributes["body"].as_graph()
    taken = node.attributes.get_int("num_scan_inputs", 0)
    assert set(node.attributes) == {"body", "num_scan_inputs"}
    states, scanned = node.inputs[:-taken], node.inputs[-taken:]
    made = 0

    def emit(
        place: Callable[[ir.Node], None], op: str, *inputs: ir.Value | None, **attributes: object
    ) -> ir.Value:
        nonlocal made
        new = ir.node(op, list(inputs), attributes=attributes)  # type: ignore[arg-type]
        new.outputs[0].name = f"{prefix}_{made}"
        made += 1
        place(new)
        return new.outputs[0]

    def before(new: ir.Node) -> None:
        graph.insert_before(node, new)

    first = next(iter(body))

    def inside(new: ir.Node) -> None:
        body.insert_before(first, new)

    turns = emit(before, "Squeeze", emit(before, "Shape", scanned[0], start=0, end=1))
    go_on = emit(before, "Constant", value=ir.tensor(True))
    turn = _scalar(f"{prefix}_turn", ir.DataType.INT64)
    goes_on = _scalar(f"{prefix}_goes_on", ir.DataType.BOOL)
    formals = list(body.inputs)
    for formal, source in zip(formals[-taken:], scanned, strict=True):
        formal.replace_all_uses_with(emit(inside, "Gather", source, turn, axis=0))
    always = emit(inside, "Identity", goes_on)
    always.type, always.shape = goes_on.type, goes_on.shape
    body.inputs[:] = [turn, goes_on, *formals[:-taken]]
    body.outputs.insert(0, always)
    del node.attributes["body"]  # a graph has one owner
    loop = ir.Node(
        "",
        "Loop",
        [turns, go_on, *states],
        [ir.AttrGraph("body", body)],
        num_outputs=len(node.outputs),
        name=node.name,
    )
    before(loop)
    for old, new in zip(node.outputs, loop.outputs, strict=True):
        take_place(old, new)
    graph.remove(node, safe=True)


def _scalar(name: str, dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([]))
