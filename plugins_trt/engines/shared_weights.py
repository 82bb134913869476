"""Weights once on the device: matrices that several engines use become inputs of them all.

An engine that holds a weight uploads a copy of its own. As an input it is a buffer that the runtime
fills once from the bundle's weights file and binds to every engine. Vectors (norms, biases) and the
weights [D,1,K] of convolutions of single channels stay in the engine: they are small, and kernels
are fused with them. docs/notes/tensorrt.md has figures.

An input cannot be folded: whatever a graph computes of a weight, other than a MatMul, it computes
at each call, into scratch memory. So columns that a graph takes of a weight are inputs themselves,
which the runtime uploads from where they lie in the whole.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

from lvlm.core.errors import BuildError, BundleError
from lvlm.plugins_trt.engines.graph_protos import read_proto
from lvlm.runtime.bundle.engine_sets import EngineWeight
from lvlm.runtime.bundle.manifest import Manifest

DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
# What reads a weight where it lies
READERS = frozenset({"MatMul", "Gemm", "Gather"})


def stored_weights(bundle: Path, manifest: Manifest) -> dict[str, dict[str, EngineWeight]]:
    """Weights by graph that lie in the bundle's weights file, by name. What quantized weights are
    made of are bytes here: an engine takes them as constants alone.

    Raises BundleError where a file holds no graph, or two graphs mean different data by one name.
    """
    found: dict[str, dict[str, EngineWeight]] = {}
    known: dict[str, EngineWeight] = {}
    for name, graph in manifest.graphs.items():
        model = read_proto(bundle / graph.file)
        packed = {
            name
            for node in model.graph.node
            if node.op_type == "DequantizeLinear"
            for name in node.input
        }
        found[name] = {
            tensor.name: bytes_of(tensor) if tensor.name in packed else _weight(tensor)
            for tensor in model.graph.initializer
            if tensor.data_location == TensorProto.EXTERNAL
        }
        for weight in found[name].values():
            if known.setdefault(weight.name, weight) != weight:
                raise BundleError(f"{bundle} has two weights named {weight.name}; export it again")
    return found


def shared_matrices(stored: Mapping[str, Mapping[str, EngineWeight]]) -> dict[str, EngineWeight]:
    """The matrices that more than one graph uses, by name."""
    uses = Counter(name for weights in stored.values() for name in weights)
    return {
        name: weight
        for weights in stored.values()
        for name, weight in weights.items()
        if uses[name] > 1 and len(weight.dims) == 2
    }


def with_inputs(model: onnx.ModelProto, weights: Mapping[str, EngineWeight]) -> list[EngineWeight]:
    """Turn those initializers of ``model`` that are in ``weights`` into inputs, in place, those of
    which parts are taken into inputs for the parts; which they are.

    Raises BuildError where the graph computes anything else of a weight than MatMuls and rows.
    """
    graph = model.graph
    taken = {tensor.name: tensor for tensor in graph.initializer if tensor.name in weights}
    parts = _take_parts(graph, taken, weights)
    read = {name for node in graph.node for name in node.input}
    found = [weights[name] for name in taken if name in read] + parts
    for weight in found:
        element = taken[weight.name if weight.columns is None else _whole(weight)].data_type
        graph.input.append(helper.make_tensor_value_info(weight.name, element, weight.dims))
    for tensor in taken.values():
        graph.initializer.remove(tensor)
    names = {weight.name for weight in found}
    for node in graph.node:
        if node.op_type not in READERS and (odd := names & set(node.input)):
            raise BuildError(
                f"{node.op_type} would be computed of the weight {min(odd)} in every call; build "
                "with --weights embedded"
            )
    return found


def _take_parts(
    graph: onnx.GraphProto,
    taken: Mapping[str, TensorProto],
    weights: Mapping[str, EngineWeight],
) -> list[EngineWeight]:
    """Remove every Slice that takes columns of a weight; weights of that name instead."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    parts: dict[str, EngineWeight] = {}
    renamed: dict[str, str] = {}
    for node in list(graph.node):
        whole = taken.get(node.input[0]) if node.op_type == "Slice" else None
        bounds = [constants.get(name) for name in node.input[1:]]
        if whole is None or len(bounds) != 3 or None in bounds or len(whole.dims) != 2:
            continue
        start, stop, axis = (int(numpy_helper.to_array(b).item()) for b in bounds if b is not None)
        if axis != 1 or not 0 <= start < stop <= whole.dims[1]:
            continue
        name = f"{whole.name}[{start}:{stop}]"
        dims = (whole.dims[0], stop - start)
        parts[name] = dataclasses.replace(
            weights[whole.name], name=name, dims=dims, columns=(start, stop)
        )
        renamed[node.output[0]] = name
        graph.node.remove(node)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    return list(parts.values())


def _whole(part: EngineWeight) -> str:
    """Name of the weight that a part is of."""
    return part.name.rpartition("[")[0]


def _weight(tensor: TensorProto) -> EngineWeight:
    weight = bytes_of(tensor)
    return dataclasses.replace(weight, dtype=DTYPES[tensor.data_type], dims=tuple(tensor.dims))


def bytes_of(tensor: TensorProto) -> EngineWeight:
    """An initializer that lies in a file, as the bytes there."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    length = int(place["length"])
    return EngineWeight(
        name=tensor.name,
        file=place["location"],
        offset=int(place.get("offset", 0)),
        bytes=length,
        dtype="uint8",
        dims=(length,),
    )
