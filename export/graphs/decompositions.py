"""Decompositions that torch.onnx runs before it translates a program, for the programs that need
them.

They trace a program twice more, which is about half of what its export takes; of most of lvlm's
graphs they change nothing but conversions to the type that a tensor has already.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _decomp, _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

SYMBOLIC = "onnx_symbolic"  # torch's namespace of nodes that go into the ONNX graph as they are
KEPT = (torch.ops.aten.reshape.default,)  # decomposed or not, it becomes one Reshape


@contextlib.contextmanager
def by_need() -> Iterator[None]:
    """Within: torch.onnx decomposes a program only if it has an op that would become others."""
    own = _fx_passes.decompose_with_registry

    def decompose(exported_program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
        known = set(_decomp.get_onnx_implemented_overloads(registry))
        if not all(_stays(node, known) for node in exported_program.graph.nodes):
            return own(exported_program, registry)
        _without_conversions(exported_program)
        return exported_program

    _fx_passes.decompose_with_registry = decompose
    try:
        yield
    finally:
        _fx_passes.decompose_with_registry = own


def _stays(node: torch.fx.Node, known: set[Any]) -> bool:
    """Whether a node has the same ONNX nodes undecomposed, or none."""
    target = node.target
    if node.op != "call_function":
        return node.op != "get_attr"
    if not isinstance(target, torch._ops.OpOverload):
        return target in known or target is operator.getitem
    if target.namespace == SYMBOLIC or target in KEPT or _is_check(node) or _is_conversion(node):
        return True
    schema = target._schema
    views = any(found.alias_info is not None for found in schema.returns)
    name = target.name()  # type: ignore[no-untyped-call]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    return target in known and not schema.is_mutable and not (views and composite)


def _is_check(node: torch.fx.Node) -> bool:
    """A check of a type or size, which torch.onnx removes."""
    return str(node.target).startswith(("aten._assert", "aten.sym_constrain_range"))


def _is_conversion(node: torch.fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.overloadpacket is torch.ops.aten.to


def _without_conversions(program: ExportedProgram) -> None:
    """Conversions to the type that a tensor has already go; the others are what they would be
    decomposed to."""
    for node in list(program.graph.nodes):
        if _is_check(node):
            program.graph.erase_node(node)
        elif _is_conversion(node):
            source, dtype = node.all_input_nodes[0], node.meta["val"].dtype
            if source.meta["val"].dtype == dtype:
                node.replace_all_uses_with(source)
                program.graph_signature.replace_all_uses(node.name, source.name)
                program.graph.erase_node(node)
            else:
                node.target, node.args = torch.ops.aten._to_copy.default, (source,)
                node.kwargs = {"dtype": dtype}
    program.graph_module.recompile()
