"""Linear layers of one input fused: the same results, and what stays alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from linear_graphs import make_store, random_values, run, save_checkpoint, traced

from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.expressions import CheckpointReading
from lvlm.export.weights.steps.fuse_linears import FuseLinears, joined_name
from lvlm.export.weights.store import WeightStore

VALUES = random_values(
    {"a.q.weight": (4, 6), "a.k.weight": (4, 2), "a.v.weight": (4, 3)}
    | {"a.q.bias": (6,), "a.k.bias": (2,), "a.v.bias": (3,)}
)
PLAIN = "q = MatMul(x, a.q.weight) k = MatMul(x, a.k.weight) v = MatMul(x, a.v.weight)"
BIASED = """qm = MatMul(x, a.q.weight) km = MatMul(x, a.k.weight) vm = MatMul(x, a.v.weight)
    q = Add(qm, a.q.bias) k = Add(a.k.bias, km) v = Add(vm, a.v.bias)"""
SHAPES = "float[2, n, 6] q, float[2, n, 2] k, float[2, n, 3] v"


def graph_of(body: str, outputs: str = SHAPES) -> TracedGraph:
    return traced(body, outputs, VALUES)


def fuse(folder: Path, graphs: Sequence[TracedGraph]) -> list[list[str]]:
    """The names of each graph's weights after fusing; their values are filled in."""
    checkpoint = save_checkpoint(folder, VALUES)
    store = make_store(graphs, checkpoint)
    FuseLinears().apply(graphs, store)
    fill(graphs, store, CheckpointReading(checkpoint.read))
    return [list(graph.parameters) for graph in graphs]


def fill(graphs: Sequence[TracedGraph], store: WeightStore, reading: CheckpointReading) -> None:
    for graph in graphs:
        for name, value in graph.parameters.items():
            value.const_value = ir.tensor(store[name].compute(reading).numpy(), name=name)


@pytest.mark.parametrize(
    ("body", "weights"),
    [(PLAIN, ["a.q+k+v.weight"]), (BIASED, ["a.q+k+v.weight", "a.q+k+v.bias"])],
    ids=["plain", "biased"],
)
def test_fused_linears_compute_the_same(body: str, weights: list[str], tmp_path: Path) -> None:
    expected = run(graph_of(body).model)
    graph = graph_of(body)
    assert fuse(tmp_path, [graph]) == [weights]
    kinds = [node.op_type for node in graph.model.graph]
    assert kinds.count("MatMul") == kinds.count("Split") == 1
    for ours, theirs in zip(run(graph.model), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    onnx.checker.check_model(ir.to_proto(graph.model), full_check=True)


def test_a_linear_layer_is_fused_in_every_graph_or_in_none(tmp_path: Path) -> None:
    assert fuse(tmp_path, [graph_of(PLAIN), graph_of(PLAIN)]) == [["a.q+k+v.weight"]] * 2
    alone = graph_of("q = MatMul(x, a.q.weight)", "float[2, n, 6] q")
    assert [len(names) for names in fuse(tmp_path, [graph_of(PLAIN), alone])] == [3, 1]


def test_what_is_used_twice_or_reads_another_input_stays(tmp_path: Path) -> None:
    twice = graph_of(
        "q = MatMul(x, a.q.weight) z = Relu(x) k = MatMul(z, a.k.weight) v = MatMul(x, a.v.weight)"
    )
    assert fuse(tmp_path, [twice]) == [["a.k.weight", "a.q+v.weight"]]
    tied = graph_of(
        "q = MatMul(x, a.q.weight) k = MatMul(x, a.k.weight) y = Transpose(a.k.weight)",
        "float[2, n, 6] q, float[2, n, 2] k, float[2, 4] y",
    )
    assert fuse(tmp_path, [tied]) == [["a.q.weight", "a.k.weight"]]


def test_names_of_fused_weights_say_what_is_in_them() -> None:
    assert joined_name(["l.0.q.weight", "l.0.k.weight"]) == "l.0.q+k.weight"
    assert joined_name(["q.weight", "deep.k.weight"]) == "q.weight+deep.k.weight"
