"""The nodes of blocks that were traced once (repeats.py), in every place where such a block is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from lvlm.core.errors import ExportError
from lvlm.export.graphs.repeats import DOMAIN, Repeats
from lvlm.export.ports import GraphPort


def write_out(
    model: ir.Model,
    repeats: Repeats,
    bodies: Sequence[ir.Model],
    parameter_names: Mapping[int, str],
) -> dict[str, ir.Value]:
    """Put each block's own copy of its kind's nodes in its place.

    Args:
        bodies: a model for each kind, of a BodyModule
        parameter_names: of the checkpoint, by id(parameter)

    Returns:
        The new initializers that are parameters, by their names in the checkpoint.
    """
    made: dict[str, ir.Value] = {}
    blocks = [node for node in model.graph if node.domain == DOMAIN]
    for number, node in enumerate(blocks):
        kind = node.attributes.get_int("kind")
        module = repeats.modules[node.attributes.get_int("module")]
        body = bodies[kind]
        copy = body.graph.clone()
        _take_sizes(copy, repeats.kinds[kind].inputs, node.inputs)
        for inside, given in zip(list(copy.inputs), node.inputs, strict=True):
            assert given is not None
            inside.replace_all_uses_with(given)
        local = {
            f"module.{name}": parameter_names.get(id(p))
            for name, p in module.named_parameters(remove_duplicate=False)
        }
        for name in list(copy.initializers):
            value, known = copy.initializers.pop(name), local.get(name)
            if value.uses():
                value = _initializer(model.graph, value, known or f"kind_{kind}.{name}")
                if known is not None:
                    made[known] = value
        _place(model.graph, node, copy, f"block_{number}")
        for domain, version in body.opset_imports.items():
            model.opset_imports.setdefault(domain, version)
        model.functions.update(body.functions)
    model.opset_imports.pop(DOMAIN, None)
    return made


def _take_sizes(
    copy: ir.Graph, described: Sequence[GraphPort], given: Sequence[ir.Value | None]
) -> None:
    """Name every size in ``copy`` as the graph that it goes into does."""
    sizes: dict[str, int | ir.SymbolicDim] = {}
    for inside, value in zip(described, given, strict=True):
        shape = None if value is None else value.shape
        for axis, size in enumerate(inside.dims):
            if isinstance(size, str):
                found = ir.SymbolicDim(None) if shape is None else shape[axis]
                if str(sizes.setdefault(size, found)) != str(found):
                    raise ExportError(f"{sizes[size]} and {found} were taken for one size")
    for node in copy.all_nodes():
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape(
                    d if isinstance(d, int) else sizes.get(str(d.value), ir.SymbolicDim(None))
                    for d in value.shape
                )


def _initializer(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """``graph``'s initializer of that name: ``value``, if there is none yet."""
    known = graph.initializers.get(name)
    if known is not None:
        value.replace_all_uses_with(known)
        return known
    value.name = name
    graph.initializers[name] = value
    return value


def _place(graph: ir.Graph, block: ir.Node, copy: ir.Graph, name: str) -> None:
    """Move the nodes of ``copy`` to where ``block`` is, and its outputs to whoever reads these."""
    nodes, outputs = list(copy), list(copy.outputs)
    copy.outputs.clear()
    copy.remove(nodes)
    graph.insert_before(block, nodes)
    for node in nodes:
        node.name = f"{name}.{node.name}"
        for value in node.outputs:
            value.name = f"{name}.{value.name}"
    for old, new in zip(block.outputs, outputs, strict=True):
        _check(name, old, new)
        new.shape = old.shape
        final = old.is_graph_output()
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        if final:
            new.name, old.name = old.name, f"{name}.{new.name}"
    graph.remove(block, safe=True)


def _check(name: str, said: ir.Value, found: ir.Value) -> None:
    """ExportError unless a block's output is of the type and sizes that were said beforehand."""
    dims = [tuple(value.shape or ()) for value in (said, found)]
    sizes = zip(*dims, strict=True) if len(dims[0]) == len(dims[1]) else [(0, 1)]
    apart = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes)
    if said.dtype != found.dtype or apart:
        raise ExportError(
            f"{name} gives {found.dtype} {found.shape}, not the {said.dtype} {said.shape} expected"
        )
