"""A graph is held to what it declares: names, types and sizes of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from settings import ASSETS, CACHED
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lvlm.core.discovery import discover
from lvlm.core.errors import ExportError
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.graphs.bundle_graphs import bundle_graphs, graph_names
from lvlm.export.graphs.graph import BundleGraph, Tensors
from lvlm.export.graphs.tracing import trace
from lvlm.export.ports import GraphPort, LayerPort, all_layers, one_layer
from lvlm.export.recipes.recipe import parse_settings
from lvlm.runtime.bundle.reader import read_bundle

ROWS = ("batch", 4)


class Toy(BundleGraph):
    """Declares x -> double [batch,4] and count [batch]; gives what it is told to."""

    name = "toy"

    def __init__(self, compute: Callable[[Tensors], dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.given = compute

    def inputs(self) -> list[GraphPort]:
        return [GraphPort("x", torch.float32, ROWS)]

    def outputs(self) -> list[GraphPort]:
        return [
            GraphPort("double", torch.float32, ROWS),
            GraphPort("count", torch.int64, ("batch",)),
        ]

    def compute(self, given: Tensors) -> dict[str, torch.Tensor]:
        return self.given(given)


def counts(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).sum(1)


def traced(compute: Callable[[Tensors], dict[str, torch.Tensor]]) -> list[str]:
    graph = Toy(compute)
    found = trace(graph, nn.Module(), FakeTensorMode(allow_non_fake_inputs=True))
    assert b"pkg.torch" not in ir.to_proto(found.model).SerializeToString()
    inputs, outputs = found.ports()
    assert [v.name for v in found.model.graph.inputs] == [p.name for p in inputs]
    assert [v.name for v in found.model.graph.outputs] == [p.name for p in outputs]
    return [p.name for p in outputs]


def test_outputs_are_in_the_order_declared() -> None:
    assert traced(lambda given: {"count": counts(given["x"]), "double": 2 * given["x"]}) == [
        "double",
        "count",
    ]


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        pytest.param(
            lambda given: {"doubel": 2 * given["x"], "count": counts(given["x"])},
            "graph toy does not give its output double",
            id="misspelt",
        ),
        pytest.param(
            lambda given: {"double": 2 * given["x"]},
            "graph toy does not give its output count",
            id="missing",
        ),
        pytest.param(
            lambda given: dict.fromkeys(("double", "count", "more"), given["x"]),
            "graph toy gives an output that it does not declare: more",
            id="one too many",
        ),
        pytest.param(
            lambda given: {"double": 2 * given["X"], "count": counts(given["x"])},
            "graph toy has no input X; it declares x",
            id="no such input",
        ),
        pytest.param(
            lambda given: {"double": 2 * given["x"], "count": counts(given["x"]).float()},
            "graph toy gives count as FLOAT .*, not as the torch.int64",
            id="another type",
        ),
        pytest.param(
            lambda given: {"double": 2 * given["x"][:, :3], "count": counts(given["x"])},
            r"graph toy gives double as FLOAT \['batch', 3\], not as .* \['batch', 4\]",
            id="another size",
        ),
    ],
)
def test_what_is_not_as_declared_is_refused_when_it_is_traced(
    compute: Callable[[Tensors], dict[str, torch.Tensor]], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        traced(compute)


def test_an_input_that_is_not_given_is_named() -> None:
    with pytest.raises(ExportError, match="graph toy is not given its input x"):
        Toy(dict)({"y": torch.zeros(1)})


def test_two_ports_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe's port could have the name of one that every graph has."""
    port = GraphPort("x", torch.float32, ROWS)
    monkeypatch.setattr(Toy, "inputs", lambda _: [port, port])
    with pytest.raises(ExportError, match="graph toy, inputs: x is declared twice"):
        traced(dict)


def test_ports_of_layers() -> None:
    own = LayerPort("slots", torch.int64, ("batch", "length", 3))
    shared = LayerPort("budget", torch.int64, ("batch",), stacked=True)
    assert [(p.name, p.dims) for p in all_layers([own, shared], 2)] == [
        ("budget", (2, "batch")),
        ("slots_0", ("batch", "length_0", 3)),
        ("slots_1", ("batch", "length_1", 3)),
    ]
    given = {"budget": torch.tensor([[1], [2]])} | {f"slots_{i}": torch.ones(i) for i in (0, 1)}
    of_one = one_layer([own, shared], 1, given)
    assert of_one["slots"] is given["slots_1"]
    assert of_one["budget"].tolist() == [2]


def test_the_manifest_and_the_files_have_the_ports_of_the_declaration(
    bundle: Callable[..., Path],
) -> None:
    name, *settings = CACHED["lightvlm (cached)"]
    folder = bundle("digits-llava", name, *settings, max_images=2)
    recipe = parse_settings(discover("lvlm.export.recipes", "RECIPE")[name], settings)
    plan = make_plan(
        ExportOptions(str(ASSETS / "digits-llava"), recipe, folder, dtype="fp32", max_images=2)
    )
    arrays = plan.family.vision_inputs(plan.images)
    graphs = bundle_graphs(plan.skeleton, plan.recipe, arrays, plan.cache_dtype)
    manifest = read_bundle(folder)
    assert (
        list(manifest.graphs)
        == [g.name for g in graphs]
        == list(graph_names(plan.recipe, plan.skeleton.language))
    )
    for graph in graphs:
        told = manifest.graphs[graph.name]
        assert told.inputs == tuple(p.for_manifest() for p in graph.inputs())
        assert told.outputs == tuple(p.for_manifest() for p in graph.outputs())
        file = onnx.load(folder / told.file, load_external_data=False).graph
        assert [v.name for v in file.input] == [p.name for p in told.inputs]
        assert [v.name for v in file.output] == [p.name for p in told.outputs]
