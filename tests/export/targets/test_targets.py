"""Targets: their data, the graphs lowered for them, and that these compute the same."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from bundles import OTHERS
from onnx import TensorProto, helper
from settings import ASSETS, CACHED

import lvlm
from lvlm.core.discovery import discover
from lvlm.core.errors import ExportError
from lvlm.core.integrity import describe
from lvlm.export.ops.op import DOMAIN, OPSET, VERSION, Op, OpSample
from lvlm.export.ops.parts.single_node import feeds, session, single_node_model
from lvlm.export.targets.description import FLOATS, NEW_OPS
from lvlm.export.targets.passes.decomposed import decompose_normalization, decompose_rotary
from lvlm.export.targets.passes.fp16_matmuls import fp16_matmuls
from lvlm.export.targets.passes.graph_edits import LOWERED_DOMAIN, lower_opset
from lvlm.export.targets.target import Target
from lvlm.plugins_trt.engines.tensorrt_builder import Settings, open_tensorrt
from lvlm.runtime.bundle.manifest import Capacity
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.engine import calls
from lvlm.runtime.options.generation_options import GenerationOptions

# Those that lower as their data says; a target with passes of its own has tests of its own.
TARGETS: dict[str, Target] = {
    name: target
    for name, target in discover("lvlm.export.targets", "TARGET").items()
    if type(target) is Target
}
OPS: dict[str, Op] = discover("lvlm.export.ops", "OP")
PLUGIN_ATTRIBUTES = {"plugin_namespace": b"lvlm", "plugin_version": b"1"}
SMALL = "llava:llama-mha-bias-rope3-siglip"
DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}


def lowered(bundle: Path, folder: Path, target: Target) -> Path:
    """A copy of a bundle with the graphs of ``target`` beside the canonical ones."""
    shutil.copytree(bundle, folder)
    manifest = read_bundle(folder)
    graphs = {name: graph.file for name, graph in manifest.graphs.items()}
    written = target.write(folder, graphs, manifest.capacity)
    assert written == [target.file(graph.file) for graph in manifest.graphs.values()]
    assert not list(folder.glob(".*"))
    return folder


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, in functions and in graphs inside nodes, too."""
    waiting = [model.graph.node, *(f.node for f in model.functions)]
    while waiting:
        for node in waiting.pop():
            yield node
            waiting += [a.g.node for a in node.attribute if a.HasField("g")]


def test_every_target_names_its_files_and_is_in_the_docs() -> None:
    assert {"trt-rtx", "trt-11", "jetson-orin-jp62", "jetson-thor-jp7", "ort-cuda"} <= set(TARGETS)
    page = (ASSETS.parent / "docs/tensorrt.md").read_text()
    for name, target in TARGETS.items():
        assert target.file("prefill.onnx") == f"prefill.{name}.onnx"
        assert f"\n| `{name}` |" in page


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_an_entry_does_not_contradict_itself(target: Target) -> None:
    assert target.imports <= NEW_OPS
    assert target.attention <= FLOATS
    assert set() != target.matmul_types <= FLOATS
    assert 20 <= target.opset <= OPSET
    if target.flavour == "onnxruntime":
        assert not target.plugins
        assert not target.static_cache
    if "TensorScatter" in target.imports and target.flavour != "onnxruntime":
        assert target.static_cache  # TensorRT's own cache write wants it
    if target.imports:
        assert target.opset >= 23


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_lowered_graphs_hold_only_what_the_target_takes(
    target: Target, dtype: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    original = bundle("tiny-llava", "lightvlm", dtype=dtype, max_images=2)
    folder = lowered(original, tmp_path / "bundle", target)
    manifest = read_bundle(folder)
    for name, graph in manifest.graphs.items():
        path = folder / target.file(graph.file)
        model = onnx.load(path, load_external_data=False)
        canonical = onnx.load(folder / graph.file, load_external_data=False)
        assert {o.domain: o.version for o in model.opset_import}[""] == target.opset
        kinds = {(node.domain, node.op_type) for node in all_nodes(model)}
        standard = {op for domain, op in kinds if domain == ""}
        assert standard & NEW_OPS <= target.imports
        if manifest.dtype not in target.attention:
            assert "Attention" not in standard
        elif name in ("vision", "decode"):
            assert "Attention" in standard
        own = {op for domain, op in kinds if domain == DOMAIN}
        functions = {(f.domain, f.name) for f in model.functions}
        if target.plugins:
            assert not functions
            assert {domain for domain, _ in kinds} <= {"", DOMAIN}
            assert "TopK" not in standard
            assert all(OPS[op].lowered is None for op in own)
        else:
            assert own == {op for domain, op in functions if domain == DOMAIN}
        fixed = all(not str(d).startswith("capacity_") for d in dimensions(model))
        assert fixed == (target.static_cache or name == "vision")
        kept, added = stored(canonical), stored(model)
        assert kept.items() <= added.items()
        bounds = [t for t in model.graph.initializer if t.name not in kept]  # of split products
        assert all((t.data_type, list(t.dims)) == (TensorProto.INT64, [1]) for t in bounds)
        assert [v.name for v in model.graph.input] == [v.name for v in canonical.graph.input]
        assert [v.name for v in model.graph.output] == [v.name for v in canonical.graph.output]
        check(model, path)


@pytest.mark.parametrize("name", OTHERS)
def test_every_family_lowers_for_every_target(
    name: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    original = bundle(name, max_images=2)
    for target in TARGETS.values():
        folder = lowered(original, tmp_path / target.name, target)
        for graph in read_bundle(folder).graphs.values():
            path = folder / target.file(graph.file)
            model = onnx.load(path, load_external_data=False)
            kinds = {(node.domain, node.op_type) for node in all_nodes(model)}
            assert {op for domain, op in kinds if domain == ""} & NEW_OPS <= target.imports
            check(model, path)
        shutil.rmtree(folder)


def dimensions(model: onnx.ModelProto) -> list[int | str]:
    values = [*model.graph.input, *model.graph.output]
    shapes = [value.type.tensor_type.shape.dim for value in values]
    return [dim.dim_param or dim.dim_value for shape in shapes for dim in shape]


def stored(model: onnx.ModelProto) -> dict[str, bytes]:
    """Initializers by name; of external ones the place, not the data."""
    return {t.name: t.SerializeToString() for t in model.graph.initializer}


def check(model: onnx.ModelProto, path: Path) -> None:
    """ONNX's checker; the attributes that only TensorRT's parser reads are unknown to a schema."""
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        extra = [a for a in node.attribute if a.name in PLUGIN_ATTRIBUTES]
        if extra:
            assert {a.name: a.s for a in extra} == PLUGIN_ATTRIBUTES
            for attribute in extra:
                node.attribute.remove(attribute)
    beside = path.with_name(f"checked-{path.name}")
    onnx.save(model, beside)
    onnx.checker.check_model(str(beside), full_check=True)


def with_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph of plugins, with the lvlm ops' functions and at their opset, for ONNX Runtime."""
    attributes: dict[str, dict[str, object]] = {}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            kept = [a for a in node.attribute if a.name not in PLUGIN_ATTRIBUTES]
            del node.attribute[:]
            node.attribute.extend(kept)
            values = {a.name: helper.get_attribute_value(a) for a in kept}
            attributes[node.op_type] = {
                k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()
            }
    for op, values in attributes.items():
        model.functions.append(OPS[op].function(values))  # type: ignore[arg-type]
    del model.opset_import[:]
    model.opset_import.extend(
        [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    )
    return model


def in_place(folder: Path, target: Target) -> Path:
    """The bundle with the graphs of ``target`` as its canonical ones."""
    manifest = read_bundle(folder)
    files = dict(manifest.files)
    for graph in manifest.graphs.values():
        path = folder / graph.file
        model = onnx.load(folder / target.file(graph.file), load_external_data=False)
        path.unlink()
        onnx.save(with_functions(model) if target.plugins else model, path)
        files[graph.file] = describe(path)
    dataclasses.replace(manifest, files=files).write(folder)
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


PORTABLE = [dataclasses.replace(t, name=f"{n}-portable", plugins=False) for n, t in TARGETS.items()]
SAME = {
    **{name: t for name, t in TARGETS.items() if "float32" in t.matmul_types},
    # At the target's own opset, which the functions of plugins' ops are newer than.
    **{t.name: t for t in PORTABLE if t.opset < OPSET},
}


@pytest.mark.parametrize("target", SAME.values(), ids=SAME)
def test_lowered_graphs_compute_the_same(
    target: Target, bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target's graphs in the canonical ones' place, on ONNX Runtime."""
    original = bundle(SMALL, *CACHED["lightvlm (cached)"], max_images=2)
    folder = in_place(lowered(original, tmp_path / "bundle", target), target)
    expected = logits(original)
    if target.static_cache:
        monkeypatch.setattr(calls, "CAPACITY_STEP", 10**6)  # these graphs take full buffers only
    for ours, theirs in zip(logits(folder), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("name", ["jetson-orin-jp62", "trt-rtx"])
def test_lowered_fp16_graphs_compute_the_same(
    name: str, bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decomposed attention has its softmax in fp32."""
    original = bundle("tiny-llava", dtype="fp16", max_images=2)
    folder = in_place(lowered(original, tmp_path / "bundle", TARGETS[name]), TARGETS[name])
    expected = logits(original)
    monkeypatch.setattr(calls, "CAPACITY_STEP", 10**6)
    for ours, theirs in zip(logits(folder), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.05)
        assert (ours.argmax(-1) == theirs.argmax(-1)).all()


HALF = [
    pytest.param(op, sample, id=f"{op.name}: {sample.name}")
    for op in OPS.values()
    for sample in op.samples()
    if torch.float16 in {t.dtype for t in sample.inputs if t is not None}
]


@pytest.mark.parametrize(("op", "sample"), HALF)
def test_products_in_fp16_are_near_the_reference(op: Op, sample: OpSample) -> None:
    """Ranks of the samples differ by more than fp16 loses."""
    model = ir.serde.deserialize_model(single_node_model(op, sample))
    TARGETS["trt-rtx-turing"].lower(model, Capacity(1, 1, ()))
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    got = session(proto).run(None, feeds(op, sample))
    expected = op(*sample.inputs, **sample.attributes)
    for formal, want, have in zip(op.schema.outputs, expected, got, strict=False):
        valid = ~sample.unspecified.get(formal.name, torch.zeros((), dtype=torch.bool)).numpy()
        difference = np.abs(have.astype(float) - want.double().numpy()) * valid
        assert difference.max(initial=0) <= 4e-3 * max(1, want.double().abs().max())


def test_narrow_products_do_not_overflow_and_keep_what_is_not_finite_in_its_place() -> None:
    text = """<ir_version: 10, opset_import: ["" : 24]>
        g (float[3, 4] a, float[4, 2] b) => (float[3, 2] y) { y = MatMul(a, b) }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    assert fp16_matmuls(model) == 1
    kinds = [n.op_type for n in model.graph]
    assert kinds.count("MatMul") == 1
    a = np.array([[3e4, 3e4, 3e4, -1], [0, 0, 0, 0], [np.nan, 1, 1, 1]], np.float32)
    b = np.array([[1e5, 1], [1e5, 2], [1e5, 3], [1, np.inf]], np.float32)
    (y,) = session(ir.to_proto(model)).run(None, {"a": a, "b": b})
    np.testing.assert_allclose(y[0, 0], 9e9, rtol=2e-3)
    assert y[1, 0] == 0
    assert np.isnan(y[2]).all()
    assert not np.isfinite(y[:, 1]).any()


def graph_of(body: str, inputs: str, outputs: str) -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 24]> g ({inputs}) => ({outputs}) {{ {body} }}'
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "kept"),
    [(3, 3, 1, False), (2, 1, 1, False), (4, 4, 1, True), (2, 2, 2, True)],
)
def test_rtx_has_a_kernel_for_the_attention_that_is_left_to_it(
    heads: int, kv_heads: int, rows: int, kept: bool
) -> None:
    model = graph_of(
        "y = Attention (q, k, v, m)",
        f"float16[B, {heads}, {rows}, 64] q, float16[B, {kv_heads}, 40, 64] k, "
        f"float16[B, {kv_heads}, 40, 64] v, bool[B, 1, 1, 40] m",
        f"float16[B, {heads}, {rows}, 64] y",
    )
    TARGETS["trt-rtx"].lower(model, Capacity(1, 1, ()))
    assert ("Attention" in {node.op_type for node in model.graph}) == kept
    pytest.importorskip("tensorrt_rtx")
    shapes = {i.name: [(n, *list(i.shape)[1:]) for n in (1, 1, 2)] for i in model.graph.inputs}
    built = open_tensorrt("tensorrt-rtx").build(
        ir.to_proto(model).SerializeToString(), Settings(shapes, sms=(86,))
    )
    assert built.engine.nbytes > 0


KINDS = {"float": (np.float32, 1e-6), "float16": (np.float16, 8e-3)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("body", "write_out"),
    [
        ("y = RMSNormalization <epsilon = 0.001> (x, w)", decompose_normalization),
        ("y = RotaryEmbedding (x, c, s)", decompose_rotary),
    ],
)
def test_what_is_written_out_computes_the_same(
    body: str, write_out: Callable[[ir.Model], int], kind: str
) -> None:
    dtype, tolerance = KINDS[kind]
    model = graph_of(
        body,
        f"{kind}[B, 2, 3, 8] x, {kind}[8] w, {kind}[B, 3, 4] c, {kind}[B, 3, 4] s",
        f"{kind}[B, 2, 3, 8] y",
    )
    random = np.random.default_rng(0)
    shapes = {"x": (2, 2, 3, 8), "w": (8,), "c": (2, 3, 4), "s": (2, 3, 4)}
    feed = {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    (expected,) = session(ir.to_proto(model)).run(None, feed)
    assert write_out(model) == 1
    lower_opset(model, 20)
    assert LOWERED_DOMAIN in {n.domain for n in model.graph}
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    (found,) = session(proto).run(None, feed)
    np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize(
    ("body", "write_out", "why"),
    [
        (
            "y = RMSNormalization <axis = 1> (x, w)",
            decompose_normalization,
            "over the last axis only",
        ),
        ("y = RotaryEmbedding <interleaved = 1> (x, w, w)", decompose_rotary, "on whole heads"),
    ],
)
def test_what_cannot_be_written_out_is_refused(
    body: str, write_out: Callable[[ir.Model], int], why: str
) -> None:
    model = graph_of(body, "float[2, 2, 3, 8] x, float[2, 3, 4] w", "float[2, 2, 3, 8] y")
    with pytest.raises(ExportError, match=why):
        write_out(model)


def test_an_opset_without_the_op_is_refused() -> None:
    with pytest.raises(ExportError, match="Swish is newer than opset 20"):
        lower_opset(graph_of("y = Swish (x)", "float[2] x", "float[2] y"), 20)
    cast = graph_of('y = Cast <to = 10, round_mode = "up"> (x)', "float[2] x", "float16[2] y")
    with pytest.raises(ExportError, match="Cast of opset 20 has no round_mode"):
        lower_opset(cast, 20)
    assert cast.opset_imports[""] == 24
    fine = graph_of("y = Cast <to = 10> (x)", "float[2] x", "float16[2] y")
    lower_opset(fine, 22)
    assert fine.opset_imports[""] == 22
    lower_opset(fine, 24)
    assert fine.opset_imports[""] == 22
