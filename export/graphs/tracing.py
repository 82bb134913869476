"""Tracing of a torch module to an ONNX graph: torch.export, torch.onnx, then a few passes.

The graph's large initializers stay fake: each keeps the name of the checkpoint's parameter, and
weights_file.py writes the values once for all graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir import tensor_adapters
from onnx_ir.passes import common
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lvlm.core.discovery import discover
from lvlm.core.errors import ExportError
from lvlm.export.graphs.block_copies import write_out
from lvlm.export.graphs.graph import BundleGraph
from lvlm.export.graphs.plain_splits import plain_splits
from lvlm.export.graphs.repeats import BodyModule, collected
from lvlm.export.graphs.torch_export import to_onnx
from lvlm.export.ops.op import DOMAIN, OPSET, VERSION, Op
from lvlm.export.ports import GraphPort
from lvlm.export.standard_ops import PLACEHOLDER_DOMAIN
from lvlm.runtime.bundle.manifest import Port


@dataclass
class TracedGraph:
    """One graph, its ports as declared; initializers named in ``parameters`` have no values yet."""

    name: str
    model: ir.Model
    parameters: dict[str, ir.Value]  # checkpoint's parameter name -> initializer
    inputs: Sequence[GraphPort] = ()
    outputs: Sequence[GraphPort] = ()

    def ports(self) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
        """Inputs and outputs as the manifest has them."""
        inputs, outputs = ([p.for_manifest() for p in ps] for ps in (self.inputs, self.outputs))
        return tuple(inputs), tuple(outputs)


def trace(graph: BundleGraph, checkpoint: nn.Module, mode: FakeTensorMode) -> TracedGraph:
    """Trace a graph over fake inputs as it declares them.

    Args:
        checkpoint: the model that the graph's parameters are of; they get their names there.
        mode: that made the parameters.

    Raises:
        ExportError: what is traced is not what the graph declares.
    """
    name, inputs, outputs = graph.name, graph.inputs(), graph.outputs()
    for what, ports in (("inputs", inputs), ("outputs", outputs)):
        _check_names(f"graph {name}, {what}", [port.name for port in ports])
    names = _parameter_names(checkpoint)
    with collected() as repeats:
        model = to_onnx(name, graph, inputs, [port.name for port in outputs], mode)
    bodies = [
        to_onnx(name, BodyModule(k), k.inputs, [f"output_{i}" for i in range(len(k.outputs))], mode)
        for k in repeats.kinds
    ]
    parameters = _claim_parameters(model, graph, names)
    parameters |= write_out(model, repeats, bodies, names)
    _check_outputs(name, model, inputs, outputs)
    _to_standard_domain(model)
    _add_functions(model)
    _constant_reshapes(model)
    plain_splits(model)
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    _without_origins(model)
    model.graph.name = name
    model.producer_name = "lvlm"
    return TracedGraph(name, model, _in_order_of_use(model.graph, parameters), inputs, outputs)


def _parameter_names(model: nn.Module) -> dict[int, str]:
    """id(parameter) -> its (first) name in the checkpoint."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    return names


def _check_names(where: str, names: Sequence[str]) -> None:
    """ExportError where a recipe's port, say, has the name of another."""
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ExportError(f"{where}: {', '.join(twice)} is declared twice")


def _check_outputs(
    name: str, model: ir.Model, inputs: Sequence[GraphPort], outputs: Sequence[GraphPort]
) -> None:
    """ExportError unless outputs have the types and sizes they are declared with."""
    sizes = {size for port in inputs for size in port.dims}

    def fits(found: int | str | None, declared: int | str) -> bool:
        if isinstance(declared, str) and declared not in sizes:
            return not isinstance(found, int)  # a size of its own: torch has another name for it
        return found in (declared, None)

    for value, port in zip(model.graph.outputs, outputs, strict=True):
        found = [d if isinstance(d, int) else d.value for d in value.shape or ()]
        same = len(found) == len(port.dims) and all(map(fits, found, port.dims))
        if value.dtype != tensor_adapters.from_torch_dtype(port.dtype) or not same:
            raise ExportError(
                f"graph {name} gives {port.name} as {value.dtype} {found}, not as the "
                f"{port.dtype} {list(port.dims)} that it declares"
            )


def _to_standard_domain(model: ir.Model) -> None:
    for node in model.graph:
        if node.domain == PLACEHOLDER_DOMAIN:
            node.domain, node.version = "", None
    model.opset_imports.pop(PLACEHOLDER_DOMAIN, None)
    model.opset_imports[""] = OPSET


def _constant_reshapes(model: ir.Model) -> None:
    """Make a Reshape's target a constant where it keeps its dynamic axes in place (0: as is).

    torch computes every target from Shape nodes. TensorRT cannot follow that arithmetic once the
    length comes from an index input, and then does not know the number of heads.
    """
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.domain != "" or node.inputs[0] is None:
            continue
        before, after = node.inputs[0].shape, node.outputs[0].shape
        if before is None or after is None:
            continue
        target = []
        for axis, dim in enumerate(after):
            if isinstance(dim, int):
                target.append(dim)
            elif axis < len(before) and dim.value is not None and before[axis] == dim:
                target.append(0)
        if len(target) != len(after):
            continue
        constant = ir.node("Constant", [], attributes={"value_ints": target})
        constant.outputs[0].name = f"{node.outputs[0].name}_target"
        model.graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _add_functions(model: ir.Model) -> None:
    """The body of every lvlm op used, as a model-local function of standard ops."""
    ops: dict[str, Op] = discover("lvlm.export.ops", "OP")
    seen: dict[str, dict[str, Any]] = {}
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        attributes = {k: a.value for k, a in node.attributes.items()}
        if seen.setdefault(node.op_type, attributes) != attributes:
            raise ExportError(f"two variants of {node.op_type} in one graph")
    for op_type, attributes in seen.items():
        function = ir.serde.deserialize_function(ops[op_type].function(attributes))
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = VERSION


def _claim_parameters(
    model: ir.Model, module: nn.Module, names: Mapping[int, str]
) -> dict[str, ir.Value]:
    """Rename initializers that are the checkpoint's parameters to their names there."""
    local = {n: names.get(id(p)) for n, p in module.named_parameters(remove_duplicate=False)}
    claimed: dict[str, ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        target = local.get(name)
        if target is None:
            continue
        if not value.uses():
            model.graph.initializers.pop(name)
            continue
        model.graph.initializers.pop(name)
        value.name = target
        model.graph.initializers[target] = value
        claimed[target] = value
    return claimed


def _without_origins(model: ir.Model) -> None:
    """torch notes at every node which line of which file it is from: more text than all the rest,
    other on every machine, and nobody else's business."""
    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def _in_order_of_use(graph: ir.Graph, parameters: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
    """Those that are used, as the nodes read them one after another."""
    names = {value: name for name, value in parameters.items()}
    used = (v for node in graph.all_nodes() for v in node.inputs if v is not None)
    return {names[v]: v for v in dict.fromkeys(used) if v in names}
