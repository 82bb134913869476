"""What an export does once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from lvlm.core.progress import Progress
from lvlm.export import exporter
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.families.llava import FAMILY, Llava
from lvlm.export.graphs.graph import BundleGraph
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.recipes.none import NoCompression


def test_the_model_without_weights_is_built_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the plan, tracing, the list of linear layers and the manifest."""
    built: list[Any] = []
    build = Llava.build

    def counted(self: Llava, config: Any) -> Any:
        built.append(config)
        return build(self, config)

    def empty(graph: BundleGraph, *_: object) -> TracedGraph:
        opset = {"": 23}
        model = ir.Model(ir.Graph([], [], nodes=[], opset_imports=opset), ir_version=10)
        return TracedGraph(graph.name, model, {}, graph.inputs(), graph.outputs())

    monkeypatch.setattr(Llava, "build", counted)
    monkeypatch.setattr(exporter, "trace", empty)
    monkeypatch.setattr(exporter, "lower", lambda _, __, graphs, ___: graphs)
    options = ExportOptions("tiny-llava", NoCompression(), tmp_path / "out", dtype="fp32")
    plan = make_plan(options)
    assert plan.family is FAMILY
    manifest = exporter.write_bundle(plan, tmp_path, Progress(0, quiet=True))
    assert manifest.text.layers == len(plan.skeleton.language.blocks)
    assert len(built) == 1
