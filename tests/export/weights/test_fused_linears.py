"""Products of one input fused: the same results, the weights side by side, and what stays alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.ops.parts.single_node import session
from lvlm.export.weights.fused_linears import fuse_linears, joined_name

WEIGHTS = {"a.q.weight": (4, 6), "a.k.weight": (4, 2), "a.v.weight": (4, 3)}
BIASES = {"a.q.bias": (6,), "a.k.bias": (2,), "a.v.bias": (3,)}
RANDOM = np.random.default_rng(0)
VALUES = {
    name: RANDOM.normal(size=shape).astype(np.float32)
    for name, shape in (WEIGHTS | BIASES | {"b.weight": (6, 6)}).items()
}
PLAIN = "q = MatMul(x, a.q.weight) k = MatMul(x, a.k.weight) v = MatMul(x, a.v.weight)"
BIASED = """qm = MatMul(x, a.q.weight) km = MatMul(x, a.k.weight) vm = MatMul(x, a.v.weight)
    q = Add(qm, a.q.bias) k = Add(a.k.bias, km) v = Add(vm, a.v.bias)"""
SHAPES = "float[2, n, 6] q, float[2, n, 2] k, float[2, n, 3] v"


def traced(body: str, outputs: str = SHAPES, **aliases: str) -> TracedGraph:
    """A graph over x [2,n,4]; every known weight's name in it is a parameter."""
    names = {name: name.replace(".", "_") for name in VALUES}
    for name, short in names.items():
        body = body.replace(name, short)
    given = ", ".join(
        f"float[{','.join(map(str, VALUES[name].shape))}] {short}"
        for name, short in names.items()
        if short in body
    )
    text = f"""<ir_version: 10, opset_import: ["" : 24]>
        g (float[2, n, 4] x) => ({outputs}) <{given}> {{ {body} }}"""
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    for info in list(model.graph.value_info):
        if info.name in names.values():  # the parser's way to declare initializers
            model.graph.value_info.remove(info)
    used = [name for name, short in names.items() if short in body]
    for name in used:
        model.graph.initializer.append(onnx.numpy_helper.from_array(VALUES[name], names[name]))
    loaded = ir.serde.deserialize_model(model)
    parameters = {}
    for name in used:
        value = loaded.graph.initializers.pop(names[name])
        value.name = aliases.get(name, name)
        loaded.graph.initializers[value.name] = value
        parameters[value.name] = value
    return TracedGraph("g", loaded, parameters)


def run(graph: TracedGraph, parts: dict[str, tuple[str, ...]]) -> list[np.ndarray]:
    """Results of the graph, its fused weights filled in."""
    for name, value in graph.parameters.items():
        members = [VALUES[n] for n in parts.get(name, (name,))]
        value.const_value = ir.tensor(np.concatenate(members, -1), name=name)
    x = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)
    found: list[np.ndarray] = session(ir.to_proto(graph.model)).run(None, {"x": x})
    return found


@pytest.mark.parametrize(("body", "tensors"), [(PLAIN, 1), (BIASED, 2)], ids=["plain", "biased"])
def test_fused_products_compute_the_same(body: str, tensors: int) -> None:
    expected = run(traced(body), {})
    graph = traced(body)
    parts = fuse_linears([graph])
    assert parts["a.q+k+v.weight"] == tuple(WEIGHTS)
    assert len(parts) == len(graph.parameters) == tensors
    kinds = [node.op_type for node in graph.model.graph]
    assert kinds.count("MatMul") == kinds.count("Split") == 1
    for ours, theirs in zip(run(graph, parts), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    onnx.checker.check_model(ir.to_proto(graph.model), full_check=True)


def test_a_product_is_fused_in_every_graph_or_in_none() -> None:
    both = [traced(PLAIN), traced(PLAIN)]
    assert set(fuse_linears(both)) == {"a.q+k+v.weight"}
    assert [list(graph.parameters) for graph in both] == [["a.q+k+v.weight"]] * 2
    alone = traced("q = MatMul(x, a.q.weight)", "float[2, n, 6] q")
    apart = [traced(PLAIN), alone]
    assert fuse_linears(apart) == {}
    assert [len(graph.parameters) for graph in apart] == [3, 1]


def test_what_is_used_twice_or_reads_another_input_stays() -> None:
    twice = traced(
        "q = MatMul(x, a.q.weight) z = Relu(x) k = MatMul(z, a.k.weight) v = MatMul(x, a.v.weight)"
    )
    assert set(fuse_linears([twice])) == {"a.q+v.weight"}
    tied = traced(
        "q = MatMul(x, a.q.weight) k = MatMul(x, a.k.weight) y = Transpose(a.k.weight)",
        "float[2, n, 6] q, float[2, n, 2] k, float[2, 4] y",
    )
    assert fuse_linears([tied]) == {}


def test_names_of_fused_tensors_say_what_is_in_them() -> None:
    assert joined_name(["l.0.q.weight", "l.0.k.weight"]) == "l.0.q+k.weight"
    assert joined_name(["q.weight", "deep.k.weight"]) == "q.weight+deep.k.weight"
