"""Graphs lowered for a target, and what ONNX Runtime takes in their place."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from settings import ASSETS

import lvlm
from lvlm.core.discovery import discover
from lvlm.core.integrity import describe
from lvlm.export.ops.op import Op
from lvlm.export.targets.target import Target
from lvlm.export.verify.graph_forms import put_functions_back
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.kv.static_capacity import static_capacity
from lvlm.runtime.options.generation_options import GenerationOptions

# Those that lower as their data says; a target with passes of its own has tests of its own.
TARGETS: dict[str, Target] = {
    name: target
    for name, target in discover("lvlm.export.targets", "TARGET").items()
    if type(target) is Target
}


def of_each_form(targets: dict[str, Target]) -> dict[str, Target]:
    """The first of those whose graphs are the same: they differ in version and platform alone."""
    forms = {}
    for name, target in targets.items():
        facts = dataclasses.asdict(target)
        for fact in ("name", "summary", "version", "platform", "sms", "topk_limit", "verified"):
            del facts[fact]
        forms.setdefault(repr(sorted(facts.items())), (name, target))
    return dict(forms.values())


FORMS = of_each_form(TARGETS)
OPS: dict[str, Op] = discover("lvlm.export.ops", "OP")
PLUGIN_ATTRIBUTES = {"plugin_namespace": b"lvlm", "plugin_version": b"1"}
SMALL = "llava:llama-mha-bias-rope3-siglip"


def lowered(bundle: Path, folder: Path, target: Target) -> Path:
    """A copy of a bundle with the graphs of ``target`` beside the canonical ones."""
    shutil.copytree(bundle, folder)
    manifest = read_bundle(folder)
    graphs = {name: graph.file for name, graph in manifest.graphs.items()}
    written = target.write(folder, graphs, static_capacity(manifest))
    own = [target.weights_file] if (folder / target.weights_file).exists() else []
    assert written == [*(target.file(graph.file) for graph in manifest.graphs.values()), *own]
    assert not list(folder.glob(".*"))
    return folder


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, in functions and in graphs inside nodes, too."""
    waiting = [model.graph.node, *(f.node for f in model.functions)]
    while waiting:
        for node in waiting.pop():
            yield node
            waiting += [a.g.node for a in node.attribute if a.HasField("g")]


def in_place(folder: Path, target: Target) -> Path:
    """The bundle with the graphs of ``target`` as its canonical ones."""
    manifest = read_bundle(folder)
    files = dict(manifest.files)
    for graph in manifest.graphs.values():
        path = folder / graph.file
        model = onnx.load(folder / target.file(graph.file), load_external_data=False)
        path.unlink()
        if target.plugins:
            put_functions_back(model)
        onnx.save(model, path)
        files[graph.file] = describe(path)
    capacity = static_capacity(manifest) if target.static_cache else manifest.capacity
    dataclasses.replace(manifest, files=files, capacity=capacity).write(folder)
    return canonical_alone(folder)


def canonical_alone(folder: Path) -> Path:
    """The bundle without lowered forms: device cpu would run those of ort-cpu."""
    manifest = read_bundle(folder)
    graphs = {name: dataclasses.replace(g, lowered={}) for name, g in manifest.graphs.items()}
    dataclasses.replace(manifest, graphs=graphs).write(folder)
    return folder


def logits(folder: Path) -> list[np.ndarray]:
    """Of two prompts, one with an image: after prefill and three steps."""
    with lvlm.load(folder, threads=1) as model:
        prompts = ["Read the top row.", "How often does 7 appear?"]
        image_lists = [[ASSETS / "samples/digits-1.png"], []]
        rows = [
            model.prepare(0, prompt, images, GenerationOptions())
            for prompt, images in zip(prompts, image_lists, strict=True)
        ]
        running = model.calls.start(rows)
        found = [running.logits.copy()]
        for _ in range(3):
            running.feed([5] * len(rows))
            found.append(running.logits.copy())
        return found


def graph_of(body: str, inputs: str, outputs: str) -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 24]> g ({inputs}) => ({outputs}) {{ {body} }}'
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))
