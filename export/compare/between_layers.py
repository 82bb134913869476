"""ONNX Runtime and TensorRT on a bundle, layer by layer, with Polygraphy.

The inputs are real: an image and a question go through the bundle on the CPU, and what every graph
is given there is given to both sides here. First every tensor of a graph that both sides know;
there, differences add up from layer to layer (limits by data type). Then every lvlm op by itself,
on the same inputs, within the tolerance of its contract (export/ops/). Against onnxruntime the
second side is the lowered graph, on ONNX Runtime too: what lowering changes, apart from what
TensorRT does.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lvlm.core.discovery import discover
from lvlm.core.errors import BackendError, ParameterError
from lvlm.core.installing import require
from lvlm.export.ops.op import DOMAIN, OPSET, VERSION, Op
from lvlm.export.targets.description import target_file
from lvlm.runtime.backends import Call, GraphSession
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.model import load

Arrays = dict[str, np.ndarray]
IMAGE = resources.files("lvlm.assets") / "samples/digits-1.png"
# Whole graphs: largest |difference| / max(1, largest |value|), as the exporter's own validation.
LIMITS = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 1e-1}


def compare(args: argparse.Namespace) -> int:
    """The exit status of ``lvlm-compare layers``: 1 if something is beyond its limit."""
    # Polygraphy decides by its environment which of the two TensorRTs it means.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(args.against == "tensorrt-rtx"))
    require("polygraphy", "pip install polygraphy")
    from onnxruntime import set_default_logger_severity
    from polygraphy.logger import G_LOGGER

    set_default_logger_severity(3)
    G_LOGGER.module_severity = G_LOGGER.ERROR
    manifest = read_bundle(args.bundle, verify=args.verify)
    recorded = record(args)
    failed = 0
    for name, graph in manifest.graphs.items():
        if args.graph and name not in args.graph:
            continue
        lowered = args.bundle / target_file(graph.file, args.target)
        if not lowered.is_file():
            raise ParameterError(
                f"{lowered} is missing; lvlm-build engine {args.bundle} --target {args.target} "
                "makes it"
            )
        if name not in recorded:
            print(f"{name}: the question did not need it, nothing to compare; ask a longer one")
            continue
        feed = padded(recorded[name], lowered)
        canonical = args.bundle / graph.file
        values, bad = whole_graph(args, manifest, canonical, lowered, feed)
        failed += bad + single_ops(args, canonical, values)
    return 1 if failed else 0


def record(args: argparse.Namespace) -> dict[str, Arrays]:
    """Inputs of the last call of every graph, for a real question on the CPU."""
    found: dict[str, Arrays] = {}

    class Recording:
        def __init__(self, name: str, call: Call, bound: Mapping[str, Any]) -> None:
            self.name, self.call, self.bound, self.stop = name, call, bound, call.stop

        def __call__(
            self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
        ) -> None:
            found[self.name] = {k: np.array(v) for k, v in {**self.bound, **inputs}.items()}
            self.call(inputs, outputs)

    class Recorder:
        def __init__(self, name: str, session: GraphSession) -> None:
            self.name, self.session = name, session

        def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Call:
            return Recording(self.name, self.session.bind(inputs, outputs), inputs)

    with load(args.bundle, verify=args.verify) as model:
        for name in model.manifest.graphs:
            session = model.graphs.sessions[name]
            model.graphs.sessions[name] = Recorder(name, session)
        model.generate(args.prompt, images=[args.image or IMAGE.read_bytes()], max_new_tokens=96)
    return found


def padded(feed: Arrays, lowered: Path) -> Arrays:
    """The cache's buffers as long as the lowered graph has them: the rest is never looked at."""
    for port in onnx.load(lowered, load_external_data=False).graph.input:
        wanted = [d.dim_value for d in port.type.tensor_type.shape.dim]
        array = feed[port.name]
        more = [(0, max(0, w - n)) for w, n in zip(wanted, array.shape, strict=True)]
        feed[port.name] = np.pad(array, more)
    return feed


def whole_graph(
    args: argparse.Namespace, manifest: Manifest, canonical: Path, lowered: Path, feed: Arrays
) -> tuple[Arrays, int]:
    """(every tensor of the canonical graph on ONNX Runtime, how many are beyond the limit)."""
    ours = run_onnx(marked(canonical, args.outputs_only), feed)
    if args.against == "onnxruntime":
        theirs = run_onnx(marked(lowered, args.outputs_only), feed)
    else:
        theirs = run_tensorrt(str(lowered), feed, args.plugins, not args.outputs_only)
    limit = LIMITS[manifest.dtype]
    bad = report(canonical.stem, ours, theirs, dict.fromkeys(ours, limit))
    return {**feed, **ours}, bad


def marked(file: Path, outputs_only: bool) -> Any:
    """The model, every tensor of the main graph an output, weights still beside the file."""
    from polygraphy.backend.onnx import modify_outputs, onnx_from_path
    from polygraphy.constants import MARK_ALL

    model = onnx_from_path(str(file))
    return model if outputs_only else modify_outputs(model, outputs=MARK_ALL, copy=False)


def run_onnx(model: Any, feed: Arrays) -> Arrays:
    from polygraphy.backend.onnx import bytes_from_onnx
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    wanted = {port.name for port in model.graph.input}
    with OnnxrtRunner(SessionFromOnnx(bytes_from_onnx(model))) as runner:
        return dict(runner.infer({k: v for k, v in feed.items() if k in wanted}))


def run_tensorrt(model: str | bytes, feed: Arrays, plugins: Path | None, every: bool) -> Arrays:
    """Built for exactly these shapes; the plugin library takes the place of the functions."""
    from polygraphy.backend.trt import (
        CreateConfig,
        EngineFromNetwork,
        ModifyNetworkOutputs,
        NetworkFromOnnxBytes,
        NetworkFromOnnxPath,
        Profile,
        TrtRunner,
        load_plugins,
    )
    from polygraphy.constants import MARK_ALL
    from polygraphy.exception import PolygraphyException

    if plugins is not None:
        if not plugins.is_file():
            raise ParameterError(f"{plugins} is missing; lvlm-build plugins makes it")
        load_plugins([str(plugins)])
    parse = NetworkFromOnnxBytes if isinstance(model, bytes) else NetworkFromOnnxPath
    network: Any = parse(model, strongly_typed=True)
    if every:
        network = ModifyNetworkOutputs(network, outputs=MARK_ALL)
    profile = Profile()
    for name, array in feed.items():
        profile.add(name, array.shape, array.shape, array.shape)
    engine = EngineFromNetwork(network, CreateConfig(profiles=[profile]))
    try:
        with TrtRunner(engine) as runner:
            known = runner.get_input_metadata()
            return dict(runner.infer({k: v for k, v in feed.items() if k in known}))
    except PolygraphyException as error:
        reason = str(error).splitlines()[0]
        raise BackendError(f"TensorRT cannot run this ({reason}); see lvlm-doctor") from None


def single_ops(args: argparse.Namespace, canonical: Path, values: Arrays) -> int:
    """Every lvlm op of a graph by itself, on the inputs it had in ONNX Runtime; how many differ."""
    model = onnx.load(canonical, load_external_data=False)
    ops: dict[str, Op] = discover("lvlm.export.ops", "OP")
    constants = {t.name: t for t in model.graph.initializer}
    failed = 0
    for node in model.graph.node:
        op = ops.get(node.op_type) if node.domain == DOMAIN else None
        if op is None or (args.against != "onnxruntime" and op.lowered is not None):
            continue  # it is no node of its own there
        for name in node.input:
            if name in constants and not constants[name].external_data:
                values[name] = numpy_helper.to_array(constants[name])
        inputs = {name: values[name] for name in node.input if name in values}
        if len(inputs) < len(set(filter(None, node.input))):
            print(f"{node.name}: not compared alone, its inputs are no outputs of the graph")
            continue
        alone, stripped = one_node(model, node, inputs, op)
        ours = run_onnx(alone, inputs)
        theirs = (
            dict(zip(node.output, reference(op, node, inputs), strict=False))
            if args.against == "onnxruntime"
            else run_tensorrt(stripped.SerializeToString(), inputs, args.plugins, every=False)
        )
        tolerance = max(t for d, t in op.tolerance.items() if str(d)[6:] in dtypes(inputs))
        what = f"  {op.name} that gives {node.output[0]}"
        failed += report(what, ours, theirs, dict.fromkeys(ours, tolerance))
    return failed


def reference(op: Op, node: onnx.NodeProto, inputs: Arrays) -> list[np.ndarray]:
    """The op's torch reference."""
    import torch

    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    attributes = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
    tensors = [torch.from_numpy(inputs[name]) if name else None for name in node.input]
    return [t.numpy() for t in op.reference(*tensors, **attributes)]


def dtypes(arrays: Arrays) -> set[str]:
    return {str(array.dtype) for array in arrays.values()}


def one_node(
    model: onnx.ModelProto, node: onnx.NodeProto, inputs: Arrays, op: Op
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Models of this node alone: with its function, and without, for a plugin to take its place."""
    types = {p.name: p.type.tensor_type.elem_type for p in model.graph.value_info}
    types |= {p.name: p.type.tensor_type.elem_type for p in model.graph.output}
    ports = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for name, a in inputs.items()
    ]
    results = [
        helper.make_tensor_value_info(name, types[name], None) for name in node.output if name
    ]
    graph = helper.make_graph([node], op.name, ports, results)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    functions = [f for f in model.functions if f.domain == DOMAIN]
    make = {"opset_imports": opsets, "ir_version": model.ir_version}
    stripped = helper.make_model(graph, **make)
    return helper.make_model(graph, functions=functions, **make), stripped


def report(what: str, ours: Arrays, theirs: Arrays, limits: Mapping[str, float]) -> int:
    """Print the comparison, the worst first; how many are beyond their limit."""
    from polygraphy.comparator import IterationResult, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    common = [name for name in ours if name in theirs]
    atol = {n: limits[n] * max(1.0, largest(ours[n])) for n in common}
    check = SimpleCompareFunc(
        atol=atol, rtol=0.0, check_error_stat="max", infinities_compare_equal=True
    )
    both = [IterationResult({n: side[n] for n in common}) for side in (ours, theirs)]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(all="ignore"):
        verdicts = check(*both)
    rows = sorted(
        ((distance(ours[n], theirs[n]) / max(1.0, largest(ours[n])), n) for n in common),
        reverse=True,
    )
    bad = [n for n in common if not verdicts[n]]
    figure, name = rows[0] if rows else (0.0, "nothing")
    worst = f"largest difference {figure:.1e} of {limits.get(name, 0):.0e}, {name}"
    print(f"{'✗' if bad else '✓'} {what}: {len(common)} tensors, {len(bad)} beyond; {worst}")
    for figure, name in rows[: len(bad)][:20]:
        print(f"    {figure:9.2e} (limit {limits[name]:.0e})  {name}")
    return len(bad) or int(not common)


def largest(array: np.ndarray) -> float:
    finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
    return float(np.abs(finite.astype(np.float64)).max()) if finite.size else 0.0


def distance(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return float("inf")
    return largest(a.astype(np.float64) - b.astype(np.float64))
