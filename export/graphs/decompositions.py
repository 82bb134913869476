"""Decompositions that torch.onnx runs before it translates a program, for the programs that need
them.

They trace a program twice more, which is about half of what its export takes; in most of lvlm's
graphs they change no more than can be put down here at once.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _decomp, _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

from lvlm.export.graphs.exchanged import exchanged

SYMBOLIC = "onnx_symbolic"  # torch's namespace of nodes that go into the ONNX graph as they are
RESHAPE, FLATTEN = torch.ops.aten.reshape.default, torch.ops.aten.flatten.using_ints
VIEW = torch.ops.aten.view.default  # whose Reshape takes sizes of 0 as they are


@contextlib.contextmanager
def by_need() -> Iterator[None]:
    """Within: torch.onnx decomposes a program only if it has an op that would become others."""
    own = _fx_passes.decompose_with_registry

    def decompose(exported_program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
        known = set(_decomp.get_onnx_implemented_overloads(registry))
        if not all(_stays(node, known) for node in exported_program.graph.nodes):
            return own(exported_program, registry)
        _decompose(exported_program)
        return exported_program

    with exchanged(_fx_passes, decompose_with_registry=decompose):
        yield


def _stays(node: torch.fx.Node, known: set[Any]) -> bool:
    """True where a node has the same ONNX nodes undecomposed, none, or those of ``_decompose``."""
    target = node.target
    if node.op != "call_function":
        return node.op != "get_attr"
    if not isinstance(target, torch._ops.OpOverload):
        return target in known or target is operator.getitem
    if target.namespace == SYMBOLIC or target is RESHAPE or _is_check(node):
        return True
    if _is_idle(node) or _is_conversion(node) or _is_unpadded(node) or _is_flatten(node):
        return True
    schema = target._schema
    views = any(found.alias_info is not None for found in schema.returns)
    name = target.name()  # type: ignore[no-untyped-call]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    return target in known and not schema.is_mutable and not (views and composite)


def _is_check(node: torch.fx.Node) -> bool:
    """A check of a type or size, which torch.onnx removes."""
    return str(node.target).startswith(("aten._assert", "aten.sym_constrain_range"))


def _is_idle(node: torch.fx.Node) -> bool:
    """One that gives its input as it is: the order in memory, and dropout outside of training."""
    if node.target is torch.ops.aten.dropout.default:
        return node.args[2] is False
    return node.target is torch.ops.aten.contiguous.default


def _is_conversion(node: torch.fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.overloadpacket is torch.ops.aten.to


def _is_unpadded(node: torch.fx.Node) -> bool:
    """A convolution whose padding is the word for none, said or not."""
    given = len(node.args) > 3 and not node.kwargs and node.args[4:5] in ((), ("valid",))
    return node.target is torch.ops.aten.conv2d.padding and given


def _is_flatten(node: torch.fx.Node) -> bool:
    """One whose axes are said by their places, of a tensor that has any."""
    if node.target is not FLATTEN or node.kwargs:
        return False
    return len(node.all_input_nodes[0].meta["val"].shape) > 0


def _decompose(program: ExportedProgram) -> None:
    """Checks, and what gives its input as it is, conversions to the type that a tensor has already
    among that, go; other conversions, flattened axes and convolutions become what they are made
    of."""
    for node in list(program.graph.nodes):
        if _is_check(node):
            program.graph.erase_node(node)
        elif _is_idle(node) or _is_conversion(node):
            source, dtype = node.all_input_nodes[0], node.meta["val"].dtype
            if source.meta["val"].dtype == dtype:
                node.replace_all_uses_with(source)
                program.graph_signature.replace_all_uses(node.name, source.name)
                program.graph.erase_node(node)
            else:
                node.target, node.args = torch.ops.aten._to_copy.default, (source,)
                node.kwargs = {"dtype": dtype}
        elif _is_unpadded(node):
            node.target = torch.ops.aten.conv2d.default
            node.args = (*node.args[:4], [0, 0], *node.args[5:])
        elif node.target is RESHAPE:
            node.target = VIEW
        elif _is_flatten(node):
            _to_view(node)
    program.graph_module.recompile()


def _to_view(node: torch.fx.Node) -> None:
    """The axes of a flatten from ``start`` to ``end`` as one."""
    (source,) = node.all_input_nodes
    shape = source.meta["val"].shape
    given = (*node.args[1:], *(0, -1)[len(node.args) - 1 :])
    start, end = (axis % len(shape) for axis in given if isinstance(axis, int))
    with node.graph.inserting_before(node):
        sizes = [_size(source, axis) for axis in range(len(shape))]
        flat = functools.reduce(_product, sizes[start : end + 1])
    node.target = VIEW
    node.args, node.kwargs = (source, [*sizes[:start], flat, *sizes[end + 1 :]]), {}


def _size(source: torch.fx.Node, axis: int) -> int | torch.fx.Node:
    """A size of a tensor: the number, or a node that gives it, the program's own if it has one."""
    size = source.meta["val"].shape[axis]
    if isinstance(size, int):
        return size
    for node in source.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        if node < source and node.meta["val"].node.expr == size.node.expr:
            return cast(torch.fx.Node, node)
    node = source.graph.call_function(torch.ops.aten.sym_size.int, (source, axis))
    node.meta["val"] = size
    return node


def _product(a: int | torch.fx.Node, b: int | torch.fx.Node) -> int | torch.fx.Node:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    source = a if isinstance(a, torch.fx.Node) else b
    assert isinstance(source, torch.fx.Node)
    node = source.graph.call_function(operator.mul, (a, b))
    left, right = (x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in (a, b))
    node.meta["val"] = left * right
    return node
