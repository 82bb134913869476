"""torch's ``split`` as one Split: its exporter writes a sequence and takes the parts out again.
TensorRT has no sequences."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def plain_splits(model: ir.Model) -> int:
    """Replace every SplitToSequence of known parts that SequenceAt alone reads, none of them an
    output of the graph; how many."""
    done = 0
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "SplitToSequence":
            done += _replace(model.graph, node)
    return done


def _replace(graph: ir.Graph, node: ir.Node) -> bool:
    sizes = _sizes(node)
    readers = [use.node for use in node.outputs[0].uses()]
    if sizes is None or any(reader.op_type != "SequenceAt" for reader in readers):
        return False
    places = [_constant(reader.inputs[1]) for reader in readers]
    if any(place is None for place in places) or any(
        reader.outputs[0].is_graph_output() for reader in readers
    ):
        return False
    name = node.outputs[0].name
    lengths = ir.node("Constant", [], attributes={"value_ints": sizes})
    lengths.outputs[0].name = f"{name}_sizes"
    split = ir.node(
        "Split",
        [node.inputs[0], lengths.outputs[0]],
        attributes={"axis": node.attributes.get_int("axis", 0)},
        num_outputs=len(sizes),
    )
    for part, value in enumerate(split.outputs):
        value.name, value.type = f"{name}_{part}", node.inputs[0].type  # type: ignore[union-attr]
    graph.insert_before(node, [lengths, split])
    for reader, place in zip(readers, places, strict=True):
        assert place is not None
        old, new = reader.outputs[0], split.outputs[int(place)]
        new.shape = old.shape if new.shape is None else new.shape
        old.replace_all_uses_with(new)
        graph.remove(reader, safe=True)
    graph.remove(node, safe=True)
    return True


def _sizes(node: ir.Node) -> list[int] | None:
    """Lengths of the parts, where they are known and no part loses its axis."""
    if node.attributes.get_int("keepdims", 1) != 1 or len(node.inputs) < 2:
        return None
    split, data = _constant(node.inputs[1]), node.inputs[0]
    if split is None or split.ndim:
        return None if split is None else [int(size) for size in split]
    shape = None if data is None else data.shape
    extent = None if shape is None else shape[node.attributes.get_int("axis", 0)]
    if not isinstance(extent, int):
        return None
    return [min(int(split), extent - start) for start in range(0, extent, int(split))]


def _constant(value: ir.Value | None) -> np.ndarray | None:
    found = None if value is None else ir.convenience.get_const_tensor(value)
    return None if found is None else found.numpy()
