"""Small graphs of linear layers whose weights are a checkpoint's, and what they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from safetensors.torch import save_file
from single_node import session

from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.store import WeightStore

Values = Mapping[str, np.ndarray]


def random_values(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors by name."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def traced(body: str, outputs: str, values: Values, width: int = 4) -> TracedGraph:
    """A graph over x [2,n,width]; the name of every value that is in ``body`` is a parameter."""
    names = {name: name.replace(".", "_") for name in values}
    for name, short in names.items():
        body = body.replace(name, short)
    used = [name for name, short in names.items() if short in body]
    given = ", ".join(f"float[{','.join(map(str, values[n].shape))}] {names[n]}" for n in used)
    text = f"""<ir_version: 10, opset_import: ["" : 24]>
        g (float[2, n, {width}] x) => ({outputs}) <{given}> {{ {body} }}"""
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    for info in list(model.graph.value_info):
        if info.name in names.values():  # the parser's way to declare initializers
            model.graph.value_info.remove(info)
    for name in used:
        model.graph.initializer.append(onnx.numpy_helper.from_array(values[name], names[name]))
    loaded = ir.serde.deserialize_model(model)
    parameters = {}
    for name in used:
        value = loaded.graph.initializers.pop(names[name])
        value.name = name
        loaded.graph.initializers[name] = value
        parameters[name] = value
    return TracedGraph("g", loaded, parameters)


def save_checkpoint(folder: Path, values: Values) -> Checkpoint:
    """A checkpoint in ``folder`` of these tensors and nothing else."""
    (folder / "config.json").write_text("{}")
    save_file({n: torch.from_numpy(v) for n, v in values.items()}, folder / "model.safetensors")
    return Checkpoint(folder, str(folder), None)


def make_store(graphs: Sequence[TracedGraph], checkpoint: Checkpoint) -> WeightStore:
    """As an export begins: every parameter named as the checkpoint's tensor."""
    names = {name: name for name in checkpoint.tensors}
    return WeightStore.of(graphs, checkpoint, names, torch.float32)


def run(model: Path | ir.Model, width: int = 4) -> list[np.ndarray]:
    """The results of a graph over x [2,n,width]."""
    x = np.random.default_rng(1).normal(size=(2, 5, width)).astype(np.float32)
    proto = onnx.load(model) if isinstance(model, Path) else ir.to_proto(model)
    found: list[np.ndarray] = session(proto).run(None, {"x": x})
    return found
