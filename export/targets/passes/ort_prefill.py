"""Attention of a prompt as chunks of ONNX Runtime's own Attention: what lies before a chunk is its
past, so that the kernel masks the chunk's own square only (docs/notes/cpu.md: what was tried).

The nodes stay what they are, so that a kernel of our own can take them; their body is this one.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import helper

from lvlm.export.ops.causal_attention import SCHEMA
from lvlm.export.ops.op import DOMAIN
from lvlm.export.ops.parts.body import Body

CHUNK = 128  # queries at most; all chunks of a prompt have the same number


def chunk_attention(model: ir.Model) -> bool:
    """Give CausalAttention this body, if all there is of it is in fp32 and gives no importance."""
    nodes = [n for n in model.graph if (n.domain, n.op_type) == (DOMAIN, SCHEMA.name)]
    fits = [
        node.attributes.get_int("importance", 0) == 0
        and node.inputs[0] is not None
        and node.inputs[0].dtype == ir.DataType.FLOAT
        for node in nodes
    ]
    if not nodes or not all(fits):
        return False
    function = ir.serde.deserialize_function(chunked_attention())
    model.functions[function.identifier()] = function
    return True


def chunked_attention() -> onnx.FunctionProto:
    """[B,Hq,N,d] of query [B,Hq,N,d], key and value [B,Hkv,N,d]."""
    g = Body()
    zero, one, axis = g.const([0]), g.const([1]), g.const([2])
    batch, heads, rows, width = (g.dim("query", a) for a in range(4))
    count = g.Div(g.Add(rows, g.const([CHUNK - 1])), g.const([CHUNK]))
    size = g.Div(g.Add(rows, g.Sub(count, one)), count)
    missing = g.Sub(g.Mul(count, size), rows)
    padded = g.Pad("query", g.Concat(g.const([0] * 6), missing, zero, axis=0))
    chunks = g.Reshape(padded, g.Concat(batch, heads, count, size, width, axis=0))
    starts = g.Mul(g.arange(count), size)

    b = Body("chunk_")
    start = b.Unsqueeze("chunk_start", b.const([0]))
    end = b.Min(b.Add(start, size), rows)
    past = [b.Slice(name, zero, start, axis) for name in ("key", "value")]
    own = [b.Slice(name, start, end, axis) for name in ("key", "value")]
    # The kernel wants its present outputs where it has a past.
    outputs = b.node("Attention", "chunk_query", *own, "", *past, count=3, is_causal=1)
    b.read_attribute("scale", "scale", onnx.AttributeProto.FLOAT)
    float_port, int_port = (
        helper.make_tensor_value_info(name, dtype, None)
        for name, dtype in (
            ("chunk_query", onnx.TensorProto.FLOAT),
            ("chunk_start", onnx.TensorProto.INT64),
        )
    )
    result = helper.make_tensor_value_info(outputs[0], onnx.TensorProto.FLOAT, None)
    body = helper.make_graph(b.nodes, "chunk", [float_port, int_port], [result])
    (done,) = g.node("Scan", g.Transpose(chunks, perm=[2, 0, 1, 3, 4]), starts, body=body,
                     num_scan_inputs=2)  # fmt: skip
    joined = g.Transpose(done, perm=[1, 2, 0, 3, 4])
    joined = g.Reshape(joined, g.Concat(batch, heads, g.const([-1]), width, axis=0))
    output = g.Slice(joined, zero, rows, axis)
    built_for = {"chunk": CHUNK, "importance": 0}
    return g.function(SCHEMA, [output], built_for, required=["scale"], inputs=SCHEMA.min_input)
