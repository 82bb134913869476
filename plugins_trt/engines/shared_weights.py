"""Weights once on the device: matrices that several engines use become inputs of them all.

An engine that holds a weight uploads a copy of its own. As an input it is a buffer that the runtime
fills once from the bundle's weights file and binds to every engine. Vectors (norms, biases) stay in
the engine: they are small, and kernels are fused with them. docs/notes/tensorrt.md has figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from lvlm.core.errors import BundleError
from lvlm.runtime.bundle.engine_sets import EngineWeight
from lvlm.runtime.bundle.manifest import Manifest

DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}


def stored_weights(bundle: Path, manifest: Manifest) -> dict[str, dict[str, EngineWeight]]:
    """Weights by graph that lie in the bundle's weights file, by name.

    Raises BundleError where two graphs mean different data by one name.
    """
    found: dict[str, dict[str, EngineWeight]] = {}
    known: dict[str, EngineWeight] = {}
    for name, graph in manifest.graphs.items():
        model = onnx.load(bundle / graph.file, load_external_data=False)
        found[name] = {
            tensor.name: _weight(tensor)
            for tensor in model.graph.initializer
            if tensor.data_location == TensorProto.EXTERNAL
        }
        for weight in found[name].values():
            if known.setdefault(weight.name, weight) != weight:
                raise BundleError(f"{bundle} has two weights named {weight.name}; export it again")
    return found


def shared_matrices(stored: Mapping[str, Mapping[str, EngineWeight]]) -> dict[str, EngineWeight]:
    """The weights of two and more dimensions that more than one graph uses, by name."""
    uses = Counter(name for weights in stored.values() for name in weights)
    return {
        name: weight
        for weights in stored.values()
        for name, weight in weights.items()
        if uses[name] > 1 and len(weight.dims) > 1
    }


def with_inputs(model: onnx.ModelProto, weights: Mapping[str, EngineWeight]) -> list[EngineWeight]:
    """Turn those initializers of ``model`` that are in ``weights`` into inputs, in place; which
    they are."""
    taken = [tensor for tensor in model.graph.initializer if tensor.name in weights]
    for tensor in taken:
        model.graph.initializer.remove(tensor)
        model.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    return [weights[tensor.name] for tensor in taken]


def _weight(tensor: TensorProto) -> EngineWeight:
    place = {entry.key: entry.value for entry in tensor.external_data}
    return EngineWeight(
        name=tensor.name,
        file=place["location"],
        offset=int(place.get("offset", 0)),
        bytes=int(place["length"]),
        dtype=DTYPES[tensor.data_type],
        dims=tuple(tensor.dims),
    )
