"""Newer standard ops as older ones, for parsers that do not know them.

Each pass turns nodes into calls of functions (``_passes.LOWERED_DOMAIN``) of ops up to opset 20.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from lvlm.core.errors import ExportError
from lvlm.export.ops.op import DOMAIN, VERSION
from lvlm.export.ops.parts.body import Body
from lvlm.export.targets.passes.graph_edits import call, identifier, lowered_function

F32 = onnx.TensorProto.FLOAT


def decompose_normalization(model: ir.Model) -> int:
    """RMSNormalization over the last axis, in fp32 whatever the data; how many there were."""
    nodes = _nodes(model, "RMSNormalization")
    for node in nodes:
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        _require(node, node.attributes.get_int("axis", -1) == -1, "over the last axis only")
        _require(node, node.attributes.get_int("stash_type", 1) == 1, "computed in fp32")
        call(model, node, _normalization(epsilon))
    return len(nodes)


def _normalization(epsilon: float) -> onnx.FunctionProto:
    g = Body()
    wide = g.Cast("x", to=F32)
    mean = g.ReduceMean(g.Mul(wide, wide), g.const([-1]))
    root = g.Sqrt(g.Add(mean, g.const(epsilon, np.float32)))
    result = g.Mul(g.CastLike(g.Div(wide, root), "x"), "scale")
    name = identifier("RMSNormalization", f"{epsilon:.9g}")
    return lowered_function(name, ["x", "scale"], g.nodes, result)


def decompose_rotary(model: ir.Model) -> int:
    """RotaryEmbedding of whole heads, the halves rotated against each other, with an angle for
    every position; how many there were."""
    nodes = _nodes(model, "RotaryEmbedding")
    for node in nodes:
        data = node.inputs[0]
        rank = len(data.shape) if data is not None and data.shape is not None else 0
        attributes = ("interleaved", "rotary_embedding_dim", "num_heads")
        usual = not any(node.attributes.get_int(name, 0) for name in attributes)
        _require(node, rank == 4 and usual and len(node.inputs) == 3, "on whole heads [B, H, N, d]")
        call(model, node, _rotary())
    return len(nodes)


def _rotary() -> onnx.FunctionProto:
    g = Body()
    cos, sin = (g.Unsqueeze(angles, g.const([1])) for angles in ("cos", "sin"))
    first, second = g.node("Split", "x", count=2, axis=-1, num_outputs=2)
    turned = (
        g.Sub(g.Mul(first, cos), g.Mul(second, sin)),
        g.Add(g.Mul(first, sin), g.Mul(second, cos)),
    )
    result = g.Concat(*turned, axis=-1)
    return lowered_function("RotaryEmbedding", ["x", "cos", "sin"], g.nodes, result)


def cache_updates(model: ir.Model) -> int:
    """TensorScatter becomes ``lvlm::CacheUpdate``, the same under a name that a plugin has; how
    many there were."""
    nodes = _cache_writes(model)
    for node in nodes:
        node.attributes.clear()
        node.domain, node.op_type, node.version = DOMAIN, "CacheUpdate", None
        model.opset_imports[DOMAIN] = VERSION
    return len(nodes)


def decompose_cache_updates(model: ir.Model) -> int:
    """TensorScatter as a scatter with an index for every number; how many there were."""
    nodes = _cache_writes(model)
    for node in nodes:
        call(model, node, _scatter())
    return len(nodes)


def _scatter() -> onnx.FunctionProto:
    g = Body()
    slots = g.Add(g.Unsqueeze("index", g.const([1])), g.arange(g.dim("update", 2)))
    slots = g.Expand(g.Unsqueeze(slots, g.const([1, 3])), g.Shape("update"))
    result = g.ScatterElements("cache", slots, "update", axis=2)
    return lowered_function("CacheUpdate", ["cache", "update", "index"], g.nodes, result)


def _cache_writes(model: ir.Model) -> list[ir.Node]:
    nodes = _nodes(model, "TensorScatter")
    for node in nodes:
        linear = node.attributes.get_string("mode", "linear") == "linear"
        axis = node.attributes.get_int("axis", -2)
        _require(node, linear and axis in (-2, 2), "linear, on axis 2 of four")
        _require(node, len(node.inputs) == 3, "with an index")
    return nodes


def _nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == "" and node.op_type == op_type]


def _require(node: ir.Node, fits: bool, what: str) -> None:
    if not fits:
        raise ExportError(f"{node.op_type} ({node.name}) can be decomposed {what}; this one is not")
