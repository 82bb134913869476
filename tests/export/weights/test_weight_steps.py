"""From graphs and a checkpoint to weights.bin: a step of this file's own among the others, places,
and what a wrong step is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from linear_graphs import make_store, random_values, run, save_checkpoint, traced

from lvlm.core.errors import ExportError
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.expressions import CheckpointReading, Expression, Fill, Transpose, Unary
from lvlm.export.weights.quantization import WeightQuantization, quantize
from lvlm.export.weights.store import WeightStore
from lvlm.export.weights.weight_steps import WeightStep, weight_steps
from lvlm.export.weights.weights_file import ALIGNMENT, WEIGHTS, WeightsFile

# As torch has them: [N,K], and a scale for every output of the first
VALUES = random_values({"q.weight": (6, 16), "k.weight": (2, 16), "q.scale": (6,)})
BODY = """qt = Transpose<perm = [1, 0]>(q.weight) qm = MatMul(x, qt) q = Mul(qm, q.scale)
    kt = Transpose<perm = [1, 0]>(k.weight) k = MatMul(x, kt)"""
OUTPUTS = "float[2, n, 6] q, float[2, n, 2] k"
SCALED = VALUES["q.weight"].T * VALUES["q.scale"]


@dataclass(frozen=True)
class Scaled(Unary):
    """A weight [K,N] with its outputs multiplied by a vector [N]."""

    by: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.of, self.by)

    def compute(self, reading: CheckpointReading) -> torch.Tensor:
        return self.of.compute(reading) * self.by.compute(reading)


class FoldScales:
    """x @ w * s becomes x @ (w * s)."""

    def apply(self, graphs: Sequence[TracedGraph], store: WeightStore) -> None:
        for graph in graphs:
            for node in list(graph.model.graph):
                if node.op_type != "Mul":
                    continue
                product, scale = (str(value.name) for value in node.inputs if value is not None)
                linear = node.inputs[0].producer()  # type: ignore[union-attr]
                assert linear is not None, product
                weight = str(linear.inputs[1].name)  # type: ignore[union-attr]
                store.replace(graphs, weight, Scaled(store[weight], store[scale]))
                node.outputs[0].replace_all_uses_with(linear.outputs[0], replace_graph_outputs=True)
                graph.model.graph.remove(node, safe=True)
                linear.outputs[0].name = "q"
                store.drop(graph, scale)


def write(
    folder: Path, steps: Sequence[WeightStep], graphs: Sequence[TracedGraph]
) -> tuple[WeightsFile, bytes]:
    """Graphs g.onnx and weights in ``folder``, as an export writes them."""
    checkpoint = save_checkpoint(folder, VALUES)
    store = make_store(graphs, checkpoint)
    for step in steps:
        step.apply(graphs, store)
    weights = WeightsFile.of(store)
    weights.attach(graphs)
    told: list[int] = []
    file = weights.write(folder, checkpoint, told.append)
    content = (folder / WEIGHTS).read_bytes()
    assert (file.bytes, sum(told)) == (len(content), weights.nbytes)
    for graph in graphs:
        ir.save(graph.model, folder / f"{graph.name}.onnx")
    return weights, content


def held(weights: WeightsFile, content: bytes, name: str) -> np.ndarray:
    """What lies in the file under a name of the table."""
    place = weights.table()[name]
    data = content[place.offset : place.offset + place.bytes]
    return np.frombuffer(data, place.dtype).reshape(place.dims)


def test_a_step_of_ones_own_is_one_more_in_the_list(tmp_path: Path) -> None:
    fold, *others = weight_steps(None, ())
    graph = traced(BODY, OUTPUTS, VALUES, width=16)
    weights, content = write(tmp_path, [fold, FoldScales(), *others], [graph])
    np.testing.assert_array_equal(
        held(weights, content, "q+k.weight"),
        np.concatenate([SCALED, VALUES["k.weight"].T], axis=-1),
    )
    assert list(weights.table()) == list(weights.names(graph)) == ["q+k.weight"]
    wanted = run(traced(BODY, OUTPUTS, VALUES, width=16).model, width=16)
    for ours, theirs in zip(run(tmp_path / "g.onnx", width=16), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_its_result_is_quantized_as_any_other(tmp_path: Path) -> None:
    how = WeightQuantization(8, 16)
    fold, *others = weight_steps(how, VALUES)
    graph = traced(BODY, OUTPUTS, VALUES, width=16)
    weights, content = write(tmp_path, [fold, FoldScales(), *others], [graph])
    numbers, scales = quantize(np.concatenate([SCALED, VALUES["k.weight"].T], axis=-1), how)
    name = "q+k.weight"
    assert list(weights.names(graph)) == [
        f"{name}.int8", f"{name}.int8.blocks", f"{name}.scale", "zero_points.8x1"
    ]  # fmt: skip
    np.testing.assert_array_equal(held(weights, content, f"{name}.int8"), numbers)
    np.testing.assert_array_equal(
        held(weights, content, f"{name}.int8.blocks"), numbers.reshape(8, 1, 16)
    )
    np.testing.assert_array_equal(held(weights, content, f"{name}.scale"), scales)
    assert (held(weights, content, "zero_points.8x1") == 128).all()


def test_graphs_share_what_they_hold(tmp_path: Path) -> None:
    """Stored once, a page each, in the order of the graphs."""
    both = traced(BODY, OUTPUTS, VALUES, width=16)
    one = traced("kt = Transpose<perm = [1, 0]>(k.weight) k = MatMul(x, kt)",
                 "float[2, n, 2] k", VALUES, width=16)  # fmt: skip
    one.name = "h"
    weights, content = write(tmp_path, weight_steps(None, ()), [one, both])
    table = weights.table()
    assert list(table) == ["k.weight", "q.weight", "q.scale"]
    assert [place.offset for place in table.values()] == [0, ALIGNMENT, 2 * ALIGNMENT]
    np.testing.assert_array_equal(held(weights, content, "k.weight"), VALUES["k.weight"].T)
    assert weights.names(one) == ("k.weight",)


def test_a_weight_that_is_read_both_ways_stays_as_it_is(tmp_path: Path) -> None:
    """As an embedding and as the head that is tied to it."""
    body = "kt = Transpose<perm = [1, 0]>(k.weight) k = MatMul(x, kt) y = Relu(k.weight)"
    graph = traced(body, "float[2, n, 2] k, float[2, 16] y", VALUES, width=16)
    weights, content = write(tmp_path, weight_steps(None, ()), [graph])
    np.testing.assert_array_equal(held(weights, content, "k.weight"), VALUES["k.weight"])


def test_fills_lie_in_the_largest() -> None:
    store = WeightStore(
        {
            name: Fill(byte, (size,), ir.DataType.UINT8)
            for name, byte, size in [("a", 1, 10), ("b", 2, 5), ("c", 1, 30), ("d", 1, 20)]
        }
    )
    weight_steps(None, ())[-1].apply([], store)
    places = WeightsFile.of(store).weights
    assert {name: (p.offset, p.shared) for name, p in places.items()} == {
        "c": (0, False), "d": (0, True), "a": (0, True), "b": (ALIGNMENT, False)
    }  # fmt: skip


class Forgetful:
    """Stores a weight transposed, and leaves the graphs as they are."""

    def apply(self, graphs: Sequence[TracedGraph], store: WeightStore) -> None:  # noqa: ARG002
        store.replace([], "q.weight", Transpose(store["q.weight"]))


def test_a_step_that_changes_one_side_only_is_refused(tmp_path: Path) -> None:
    graph = traced(BODY, OUTPUTS, VALUES, width=16)
    with pytest.raises(ExportError, match=r"g takes q.weight as FLOAT \[6,16\], but it is stored"):
        write(tmp_path, [Forgetful()], [graph])


def test_one_name_stands_for_one_weight(tmp_path: Path) -> None:
    graph = traced(BODY, OUTPUTS, VALUES, width=16)
    store = make_store([graph], save_checkpoint(tmp_path, VALUES))
    assert store.add(graph, "q.weight", store["q.weight"]) is graph.parameters["q.weight"]
    with pytest.raises(ExportError, match=r"two different weights are named q\.weight"):
        store.add(graph, "q.weight", store["k.weight"])
