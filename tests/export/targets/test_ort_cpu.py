"""Target ort-cpu: which graphs it lowers, to what, and that these compute the same."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from settings import ASSETS, CACHED

import lvlm
from lvlm.export.targets.ort_cpu import TARGET
from lvlm.export.targets.passes.last_rows import keep_last_rows
from lvlm.export.targets.passes.ort_fusions import fuse_silu, fuse_skip_normalization
from lvlm.runtime.backends import cpu
from lvlm.runtime.backends.ort.sessions import AGAIN
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.options.generation_options import GenerationOptions

NONE = ("none",)
LIGHT = CACHED["lightvlm (cached)"]
ELASTIC = CACHED["elastic-cache (cached)"]


def kinds(path: Path) -> Counter[str]:
    model = onnx.load(path, load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


def canonical(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle whose manifest lists no lowered graph."""
    shutil.copytree(bundle, folder)
    manifest = read_bundle(folder)
    graphs = {n: dataclasses.replace(g, lowered={}) for n, g in manifest.graphs.items()}
    dataclasses.replace(manifest, graphs=graphs).write(folder)
    return folder


def test_bundles_for_the_cpu_have_lowered_graphs(bundle: Callable[..., Path]) -> None:
    def lowered(manifest: Manifest) -> dict[str, dict[str, str]]:
        return {name: graph.lowered for name, graph in manifest.graphs.items() if graph.lowered}

    for dtype in ("fp32", "fp16"):
        manifest = read_bundle(bundle("digits-llava", dtype=dtype, max_images=2))
        names = {g: {TARGET.name: f"{g}.ort-cpu.onnx"} for g in ("prefill", "extend", "decode")}
        assert lowered(manifest) == names
    assert lowered(read_bundle(bundle("digits-llava", dtype="bf16", max_images=2))) == {}


def test_prefill_follows_the_last_token_alone_after_the_last_attention(
    bundle: Callable[..., Path],
) -> None:
    folder = bundle("digits-llava", max_images=2)
    layers = read_bundle(folder).text.layers
    model = onnx.load(folder / "prefill.ort-cpu.onnx", load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert (kinds["GatherElements"], kinds["CausalAttention"]) == (0, layers)
    (function,) = (f for f in model.functions if f.name == "CausalAttention")
    # In chunks, each with what lies before as its past
    (scan,) = (node for node in function.node if node.op_type == "Scan")
    assert "Attention" in {node.op_type for node in scan.attribute[0].g.node}
    nodes = list(model.graph.node)
    attention = max(i for i, n in enumerate(nodes) if n.op_type == "CausalAttention")
    rest = [node.op_type for node in nodes[attention:]]
    assert rest.count("GatherND") == 2  # of the attention and of what it is added to
    assert rest.index("GatherND") < rest.index("Linear")


@pytest.mark.parametrize("recipe", [NONE, LIGHT, ELASTIC], ids=["none", "lightvlm", "elastic"])
def test_lowered_decode_attends_with_one_node(
    recipe: tuple[str, ...], bundle: Callable[..., Path]
) -> None:
    folder = bundle("digits-llava", *recipe, max_images=2)
    manifest = read_bundle(folder)
    layers = manifest.text.layers
    before, after = (kinds(folder / f) for f in ("decode.onnx", "decode.ort-cpu.onnx"))
    assert after["SkipSimplifiedLayerNormalization"] == 2 * layers - 1
    assert after["QuickGelu"] == layers
    assert after["WrittenAttention" if recipe is ELASTIC else "AppendedAttention"] == layers
    assert after["Attention"] == 0
    # Elastic Cache's next victim may lie anywhere; LightVLM has a ring of queries.
    assert after["TensorScatter"] == {LIGHT: layers, ELASTIC: 2 * layers}.get(recipe, 0)
    assert after.total() < (0.85 if recipe is ELASTIC else 0.6) * before.total()
    ours, theirs = (
        onnx.load(folder / f, load_external_data=False).graph
        for f in ("decode.ort-cpu.onnx", "decode.onnx")
    )
    assert [x.name for x in ours.input] == [x.name for x in theirs.input]
    again = {f"{x.name}{AGAIN}" for x in theirs.output if recipe is ELASTIC and x.name != "logits"}
    assert [x.name for x in ours.output if x.name not in again] == [x.name for x in theirs.output]
    assert again <= {x.name for x in ours.output}
    weights = set(manifest.graphs["decode"].weights)
    assert weights == {t.name for t in ours.initializer} & weights


@pytest.mark.parametrize(
    ("model", "recipe", "dtype", "tolerance"),
    [
        ("digits-llava", NONE, "fp32", 2e-4),
        ("digits-llava", LIGHT, "fp32", 2e-4),
        ("digits-llava", ELASTIC, "fp32", 2e-4),
        ("digits-llava", NONE, "fp16", 0.1),
        ("digits-llava", ELASTIC, "fp16", 0.1),
        ("llava:llama-mha-bias-rope3-siglip", ELASTIC, "fp32", 2e-4),
        ("llava:llama-mha-bias-rope3-siglip", NONE, "fp32", 2e-4),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else str(x),
)
def test_lowered_decode_computes_the_same(
    model: str,
    recipe: tuple[str, ...],
    dtype: str,
    tolerance: float,
    bundle: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Rows of very different lengths, more steps than a ring has slots."""
    original = bundle(model, *recipe, dtype=dtype, max_images=2)
    expected = logits(canonical(original, tmp_path / "canonical"))
    for ours, theirs in zip(logits(original), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance)


@pytest.mark.parametrize("library", [True, False], ids=["C library", "Python package"])
def test_a_cache_given_twice_is_bound_to_one_memory(
    library: bool, bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the node copies the whole cache at every step, and nobody would see it but a clock."""
    if not library:
        monkeypatch.setattr(cpu, "find_library", lambda: None)
    with lvlm.load(bundle("digits-llava", *ELASTIC, max_images=2), threads=1) as model:
        budgets = Budgets.of(model.manifest.cache_policy, model.manifest.text.layers, None)
        capacities = np.array(model.manifest.capacity.per_layer)
        buffers = model.calls.cache_for(1, capacities, budgets).buffers
        _, outputs = model.graphs.bind("decode", buffers).lasting  # type: ignore[attr-defined]
        for name, buffer in buffers.items():
            assert outputs[f"present_{name}{AGAIN}"] is outputs[f"present_{name}"] is buffer


def logits(folder: Path) -> list[np.ndarray]:
    prompts = ["Read the top row.", "7?", "How often does 7 appear in this picture, and where?"]
    image_lists = [[ASSETS / "samples/digits-1.png"], [], [ASSETS / "samples/digits-2.png"] * 2]
    with lvlm.load(folder, threads=1) as model:
        rows = [
            model.prepare(i, prompt, images, GenerationOptions())
            for i, (prompt, images) in enumerate(zip(prompts, image_lists, strict=True))
        ]
        batch = model.calls.start(rows)
        found = [batch.logits.copy()]
        for step in range(20):
            batch.feed([5 + step] * len(rows))
            found.append(batch.logits.copy())
        return found


def graph_of(body: str) -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : 24]>
        g (float[2, 3, 8] x, float[2, 3, 8] y, float[8] c) => (float[2, 3, 8] z, float[2, 3, 8] t)
        <float[8] w = {{{", ".join(["0.5"] * 8)}}}>
        {{ {body} }}"""
    return ir.serde.deserialize_model(
        onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    )


def last_rows(body: str) -> list[str]:
    """Node types after the pass, of a graph that reads row ``at`` of z."""
    text = f"""<ir_version: 10, opset_import: ["" : 24]>
        g (float[B, N, 8] x, float[B, N, 8] y, int64[B, 1, 8] at) => (float[B, 1, 8] last)
        <float[8, 8] w = {{{", ".join(["0.5"] * 64)}}}, float[8] b = {{{", ".join(["1"] * 8)}}}>
        {{ {body} row = GatherElements <axis = 1> (z, at) last = Identity(row) }}"""
    before = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    after = ir.serde.deserialize_model(before)
    keep_last_rows(after)
    random = np.random.default_rng(0)
    feeds = {n: random.normal(size=(2, 5, 8)).astype(np.float32) for n in ("x", "y")}
    feeds["at"] = np.repeat([[[3]], [[1]]], 8, axis=2)
    results = [
        ReferenceEvaluator(m).run(None, feeds)[0] for m in (before, ir.serde.serialize_model(after))
    ]
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)
    return [node.op_type for node in after.graph]


def test_rows_that_nobody_reads_are_not_computed() -> None:
    assert last_rows("t = MatMul(x, w) z = Add(t, y)").index("MatMul") > 1
    gated = last_rows("t = MatMul(x, w) g, u = Split <axis = 2, num_outputs = 2> (t) "
                      "s = Sigmoid(g) m = Mul(s, u) z = Concat <axis = 2> (m, m)")  # fmt: skip
    assert "GatherND" not in gated  # Concat is not known to go row by row
    assert "GatherND" not in last_rows("t = ReduceSum(x) z = Add(y, t)")  # one number for all


def test_sums_that_are_not_normalised_or_not_of_two_states_stay() -> None:
    fused = graph_of("t = Add(x, y) z = RMSNormalization <epsilon = 0.001> (t, w)")
    assert fuse_skip_normalization(fused) == 1
    assert [node.op_type for node in fused.graph] == ["SkipSimplifiedLayerNormalization"]
    for body in (
        "t = Add(x, w) z = RMSNormalization (t, w)",  # a bias
        "t = Add(x, y) z = RMSNormalization <axis = 1> (t, w)",
        "t = Add(x, y) z = RMSNormalization (y, w)",
        "t = Add(x, y) z = RMSNormalization (t, c)",  # computed, maybe after the sum
    ):
        assert fuse_skip_normalization(graph_of(body)) == 0


def test_a_gate_of_something_else_is_no_silu() -> None:
    assert fuse_silu(graph_of("s = Sigmoid(x) z = Mul(s, x) t = Add(x, y)")) == 1
    for body in (
        "s = Sigmoid(x) z = Mul(s, y) t = Add(x, y)",
        "s = Sigmoid(x) z = Mul(s, x) t = Add(s, y)",
    ):
        assert fuse_silu(graph_of(body)) == 0
