"""Graph passes that targets are made of; each takes an onnx-ir model and changes it in place."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper
from onnx_ir.passes import common

from lvlm.core.discovery import discover
from lvlm.core.errors import ExportError
from lvlm.export.ops.op import DOMAIN, OPSET, VERSION, Attribute, Op
from lvlm.export.ops.parts.body import Body
from lvlm.export.ops.parts.chunked_attention import capped
from lvlm.export.targets.passes.attention_sites import softcap_of

LOWERED_DOMAIN = "lvlm.lowered"
# As the manifest names them
DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}


def fix_dimensions(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Make the dynamic dimensions named in ``sizes`` static, wherever they appear."""
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            dims = [sizes.get(str(d), d) if not isinstance(d, int) else d for d in value.shape]
            value.shape = ir.Shape(dims)


def refuse_low_precision(model: ir.Model, target: str, *, weights: bool) -> None:
    """ExportError for a low-precision cache and, if ``weights``, for quantized weights."""
    for node in model.graph:
        if weights and node.op_type == "DequantizeLinear":
            what, flag = "quantized weights", "--weights"
        elif node.op_type == "TensorScatter" and any(
            use.node.op_type in ("Cast", "CacheDequantize") for use in node.outputs[0].uses()
        ):
            what, flag = "a cache of lower precision than it computes in", "--cache"
        else:
            continue
        raise ExportError(f"target {target} does not take {what}; export without {flag}")


def lower_ops(model: ir.Model, plugins: bool) -> None:
    """Replace every lvlm op that has a form for TensorRT (``Op.lowered``) by the nodes of that
    form, and add the functions of the lvlm ops among them. ``plugins``: those will be plugins.

    Postcondition: what an optional output alone was computed from is gone where nothing reads it.
    """
    ops: dict[str, Op] = discover("lvlm.export.ops", "OP")
    lowered = set()
    for node in model.graph:
        if node.domain == DOMAIN and (form := ops[node.op_type].lowered) is not None:
            function = ir.serde.deserialize_function(form(_attributes(node), plugins))
            model.functions[function.identifier()] = function
            lowered.add(function.identifier())
    common.InlinePass(lambda function: function.identifier() in lowered)(model)
    common.RemoveUnusedNodesPass()(model)
    for node in model.graph:
        if node.domain == DOMAIN:
            _add_function(model, ops[node.op_type].function(_attributes(node)))


def _attributes(node: ir.Node) -> dict[str, Attribute]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _add_function(model: ir.Model, proto: onnx.FunctionProto) -> None:
    function = ir.serde.deserialize_function(proto)
    known = model.functions.setdefault(function.identifier(), function)
    if dict(known.attributes) != dict(function.attributes):
        raise ExportError(f"two variants of {function.name} in one graph")


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """An initializer, made once."""
    known = model.graph.initializers
    if name not in known:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        known[name] = value
    return known[name]


def call(model: ir.Model, node: ir.Node, proto: onnx.FunctionProto) -> None:
    """Turn ``node`` into a call of a function with the same inputs and outputs."""
    function = ir.serde.deserialize_function(proto)
    model.functions.setdefault(function.identifier(), function)
    model.opset_imports[LOWERED_DOMAIN] = 1
    node.domain, node.op_type, node.version = LOWERED_DOMAIN, function.name, None
    node.attributes.clear()


def lowered_function(
    name: str, inputs: Sequence[str], nodes: Sequence[onnx.NodeProto], result: str
) -> onnx.FunctionProto:
    """A function of one output; equal names must mean equal bodies."""
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(LOWERED_DOMAIN, name, inputs, [result], nodes, opsets)


def identifier(*parts: object) -> str:
    """A name for the variant of a function."""
    return re.sub(r"\W", "_", "_".join(map(str, parts)))


def inline_lowered(model: ir.Model) -> None:
    """Put the bodies of all functions of LOWERED_DOMAIN where they are called."""
    common.InlinePass(lambda function: function.domain == LOWERED_DOMAIN)(model)
    model.opset_imports.pop(LOWERED_DOMAIN, None)


def use_plugins(model: ir.Model) -> None:
    """Take the functions of all lvlm ops away, so that a parser looks for plugins.

    Postcondition: no op is left that is lowered instead of having a plugin (``Op.lowered``).
    """
    for node in model.graph:
        if node.domain == DOMAIN:
            # Before TensorRT 10.10 the namespace is taken from here only, not from the domain.
            node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", DOMAIN)
            node.attributes["plugin_version"] = ir.AttrString("plugin_version", str(VERSION))
    for identifier in [i for i in model.functions if i[0] == DOMAIN]:
        del model.functions[identifier]


def lower_opset(model: ir.Model, newest: int) -> None:
    """Declare standard ops of at most opset ``newest``. Raises ExportError for an op or attribute
    that it does not have; for those it has, later opsets have brought new types only."""
    version = model.opset_imports[""]
    if version <= newest:
        return
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for scope in scopes:
        for node in _nodes(scope):
            if node.domain == "":
                _check_known(node, newest)
    model.opset_imports[""] = newest
    for scope in scopes:
        if "" in scope.opset_imports:
            scope.opset_imports[""] = newest


def _nodes(scope: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """All nodes, also those in graphs inside nodes (Scan)."""
    yield from ir.traversal.RecursiveGraphIterator(scope)


def _check_known(node: ir.Node, opset: int) -> None:
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        raise ExportError(
            f"{node.op_type} is newer than opset {opset}; it is to be decomposed"
        ) from None
    given = [value for value in node.inputs if value is not None]
    unknown = set(node.attributes) - set(schema.attributes)
    if unknown or not schema.min_input <= len(given) <= schema.max_input:
        what = f"has no {', '.join(sorted(unknown))}" if unknown else "takes other inputs"
        raise ExportError(f"{node.op_type} of opset {opset} {what}; it is to be decomposed")


def decompose_attention(model: ir.Model, kept: Collection[str] = (), row_heads: int = 1) -> int:
    """Replace Attention by MatMuls and a softmax in fp32, but for data types in ``kept``; also
    there where its one query row has fewer heads than ``row_heads``, logits are capped, or a mask
    meets heads of a size that 8 does not divide, which TensorRT-RTX 1.7 does not build in half
    precision. Returns how many there were.

    Precondition: 4-D inputs with static head counts, no cache inputs.
    """
    replaced = 0
    for node in model.graph:
        if node.domain != "" or node.op_type != "Attention":
            continue
        query, key = node.inputs[0], node.inputs[1]
        if query is None or key is None or query.shape is None or key.shape is None:
            raise ExportError(f"the shape of {node.name} is unknown; it cannot be decomposed")
        heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
        few = query.shape[2] == 1 and isinstance(heads, int) and heads < row_heads
        softcap = softcap_of(node)
        odd = len(node.inputs) == 4 and isinstance(head_dim, int) and head_dim % 8 != 0
        if query.dtype is None or (
            DTYPES[query.dtype] in kept and not few and not odd and not softcap
        ):
            continue
        if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(head_dim, int)):
            raise ExportError(f"the heads of {node.name} are not static; it cannot be decomposed")
        if set(node.attributes) - {"is_causal", "scale", "softcap"} or len(node.outputs) > 1:
            raise ExportError(f"{node.name} does more than attention; it cannot be decomposed")
        causal = node.attributes.get_int("is_causal", 0) == 1
        scale = node.attributes.get_float("scale", head_dim**-0.5)
        fp32 = query.dtype == ir.DataType.FLOAT
        masked = len(node.inputs) == 4
        form = (heads, kv_heads, head_dim, causal, scale, softcap, masked, fp32)
        call(model, node, _attention(*form))
        replaced += 1
    return replaced


def _attention(
    heads: int,
    kv_heads: int,
    head_dim: int,
    causal: bool,
    scale: float,
    softcap: float,
    masked: bool,
    fp32: bool,
) -> onnx.FunctionProto:
    """Attention over q [B,heads,N,d], k and v [B,kv_heads,S,d] in ops every version knows; where
    ``masked`` a boolean mask [B,1,1,S] says which keys are seen. Without ``fp32`` data is in
    half precision, but for the cap of logits and the softmax."""
    g = Body()
    axis = g.const([2])
    # [B,kv,G,N,d] x [B,kv,1,d,S]: the heads of a group share keys without copying them.
    grouped = g.Reshape("q", g.const([0, kv_heads, heads // kv_heads, -1, head_dim]))
    keys, values = g.Unsqueeze("k", axis), g.Unsqueeze("v", axis)
    factor = g.const(scale, np.float32)
    scaled = g.Mul(grouped, factor if fp32 else g.CastLike(factor, "q"))
    scores = g.MatMul(scaled, g.Transpose(keys, perm=[0, 1, 2, 4, 3]))
    scores = scores if fp32 else g.Cast(scores, to=onnx.TensorProto.FLOAT)
    scores = capped(g, scores, softcap)
    hidden = g.const(-3.0e38, np.float32)
    if masked:
        scores = g.Where(g.Unsqueeze("mask", axis), scores, hidden)
    if causal:
        at = g.arange(g.dim("q", 2))
        sees = g.GreaterOrEqual(g.Unsqueeze(at, g.const([1])), at)
        scores = g.Where(sees, scores, hidden)
    weights = g.Softmax(scores, axis=-1)
    mixed = g.MatMul(weights if fp32 else g.CastLike(weights, "q"), values)
    result = g.Reshape(mixed, g.const([0, heads, -1, head_dim]))
    inputs = ["q", "k", "v", *(["mask"] if masked else [])]
    marks = {"causal": causal, "masked": masked, "low_precision": not fp32}
    caps = [f"capped_{softcap:.9g}"] if softcap else []
    parts = [heads, kv_heads, head_dim, f"{scale:.9g}", *caps, *filter(marks.get, marks)]
    return lowered_function(identifier("Attention", *parts), inputs, g.nodes, result)
