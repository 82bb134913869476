"""Every form of a bundle's graphs that can be run on this machine, as sessions of one backend.

ONNX Runtime runs the files over the weights where they lie, mapped, without packing or folding
them into copies. What a file lacks for that is put into it in memory: the functions of the lvlm
ops where a target has plugins for them, and fp32 for bf16, which the CPU provider does not compute.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
from onnx import helper

from lvlm.core.discovery import discover
from lvlm.export.ops.op import DOMAIN, OPSET, VERSION, Op
from lvlm.export.targets.description import LARGE
from lvlm.export.targets.target import Target
from lvlm.export.verify.waiting import let_quantized_wait
from lvlm.export.verify.widened import widen
from lvlm.runtime.backends import GraphSession, open_backend
from lvlm.runtime.backends.ort.sessions import OnnxRuntime, OrtSession, check_ports, failure
from lvlm.runtime.bundle.manifest import Graph, Manifest

if TYPE_CHECKING:
    from lvlm.runtime.backends import Backend

CANONICAL = "canonical"
SHORT = {"float16": "fp16", "bfloat16": "bf16"}
PLUGIN = ("plugin_namespace", "plugin_version")  # attributes that only TensorRT reads


@dataclass(frozen=True)
class GraphForm:
    """One form of the graphs: graph -> file. ``widened``: the manifest's dtype if that is made fp32
    in memory, or ""; ``functions``: the lvlm ops' functions are put back; ``rounds``: computes in
    fp16; ``reason``: why it cannot be run here, or ""."""

    name: str
    files: Mapping[str, str]
    widened: str = ""
    functions: bool = False
    rounds: bool = False
    reason: str = ""
    static: bool = False

    @property
    def how(self) -> str:
        """The change to the files that runs them."""
        widened = f"{SHORT[self.widened]} widened to fp32" if self.widened else ""
        functions = "the lvlm ops' functions put back" if self.functions else ""
        return ", ".join(x for x in (widened, functions) if x)


def canonical(manifest: Manifest, *, widened: bool) -> GraphForm:
    """The canonical graphs; in fp32 if asked for, and where nothing else computes their dtype."""
    files = {n: g.file for n, g in manifest.graphs.items()}
    if manifest.dtype == "bfloat16" or (widened and manifest.dtype in SHORT):
        return GraphForm(CANONICAL, files, manifest.dtype)
    return GraphForm(CANONICAL, files, rounds=manifest.dtype in SHORT)


def forms_of(manifest: Manifest) -> list[GraphForm]:
    """The canonical graphs first, then those of every target in the bundle; graphs in fp16 that
    device cpu runs come twice."""
    known: dict[str, Target] = discover("lvlm.export.targets", "TARGET")
    found = [canonical(manifest, widened=True)]
    widened = found[0].widened
    for name in dict.fromkeys(t for g in manifest.graphs.values() for t in g.lowered):
        files = {n: g.lowered.get(name, g.file) for n, g in manifest.graphs.items()}
        target = known[name]
        if target.flavour == "openvino":  # computes in fp32 whatever the graphs are in
            found.append(GraphForm(name, files, reason=_without_openvino(manifest)))
            continue
        form = GraphForm(name, files, widened, target.plugins, static=target.static_cache)
        found.append(form)
        if target.flavour == "onnxruntime" and widened == "float16":
            found.append(replace(form, widened="", rounds=True))
    return found


def _without_openvino(manifest: Manifest) -> str:
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed"
    if sum(w.bytes for w in manifest.weights.values()) > LARGE:
        return f"OpenVINO would copy the weights, which are more than {LARGE / 1e9:g} GB"
    return ""


# What is loaded already, by file and what was put into it: forms share files, and so do runs
Opened = dict[tuple[str, str], GraphSession]


def open_form(form: GraphForm, manifest: Manifest, opened: Opened) -> tuple[Backend, Manifest]:
    """A backend that runs the form's files, and the manifest as it is to be read with it."""
    if form.name == "openvino":
        return open_backend("openvino"), manifest
    return Mapped(form, opened), as_float32(manifest) if form.widened else manifest


def as_float32(manifest: Manifest) -> Manifest:
    """A bundle's manifest for graphs that are widened."""
    low = manifest.dtype

    def as_fp32(graph: Graph) -> Graph:
        inputs, outputs = (
            tuple(replace(p, dtype="float32") if p.dtype == low else p for p in ports)
            for ports in (graph.inputs, graph.outputs)
        )
        return replace(graph, inputs=inputs, outputs=outputs)

    graphs = {name: as_fp32(graph) for name, graph in manifest.graphs.items()}
    cache = "float32" if manifest.cache_dtype == low else manifest.cache_dtype
    return replace(manifest, dtype="float32", cache_dtype=cache, graphs=graphs)


class Mapped(OnnxRuntime):
    """ONNX Runtime on the CPU over mapped weights. Slower than device cpu, and small."""

    name = "cpu"

    def __init__(self, form: GraphForm, opened: Opened) -> None:
        import onnxruntime

        super().__init__(onnxruntime, ["CPUExecutionProvider"], None)
        self.form, self.static_capacity, self.opened = form, form.static, opened

    def load(self, folder: Path, manifest: Manifest, name: str) -> GraphSession:
        key = self.form.files[name], self.form.how
        if key not in self.opened:
            self.opened[key] = self._open(folder, manifest.graphs[name], key[0])
        return self.opened[key]

    def _open(self, folder: Path, graph: Graph, file: str) -> GraphSession:
        options = self.options()
        options.enable_mem_pattern = False
        # Beyond basic, casts of weights are folded into copies; the arena would keep every cast
        options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.enable_cpu_mem_arena = False
        # In the other order every cast comes first, before any MatMul takes its result
        options.execution_order = self.ort.ExecutionOrder.PRIORITY_BASED
        options.add_session_config_entry("session.disable_prepacking", "1")
        # Threads of many sessions would spin against each other's, and against torch's
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        place = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(place, str(folder.absolute()))
        try:
            session = self.ort.InferenceSession(
                runnable(folder / file, self.form),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"],
            )
        except Exception as error:
            raise failure(error, f"{file} cannot be loaded by ONNX Runtime") from None
        given = [o.name for o in session.get_outputs()]
        check_ports(graph, [i.name for i in session.get_inputs()], given)
        return OrtSession(session, graph, given, self.device, self.ort.RunOptions)


def runnable(path: Path, form: GraphForm) -> bytes:
    """The graph in a file, with what ONNX Runtime needs beside it; its weights stay outside."""
    model = onnx.load(path, load_external_data=False)
    quantized = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    if not form.how and not quantized:
        return path.read_bytes()
    if form.functions:
        put_functions_back(model)
    if form.widened or quantized:
        changed = ir.from_proto(model)
        let_quantized_wait(changed)
        model = ir.to_proto(widen(changed, form.widened) if form.widened else changed)
    return bytes(model.SerializeToString())


def put_functions_back(model: onnx.ModelProto) -> None:
    """The lvlm ops' functions, which plugins stand for, and the opset that they are written in."""
    ops: dict[str, Op] = discover("lvlm.export.ops", "OP")
    attributes: dict[str, dict[str, Any]] = {}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            kept = [a for a in node.attribute if a.name not in PLUGIN]
            del node.attribute[:]
            node.attribute.extend(kept)
            values = {a.name: helper.get_attribute_value(a) for a in kept}
            attributes[node.op_type] = {
                k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()
            }
    for op, values in attributes.items():
        model.functions.append(ops[op].function(values))
    del model.opset_import[:]
    model.opset_import.extend(
        [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    )
