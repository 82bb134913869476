"""``CausalAttention`` against loops over rows, heads and queries; with and without importance; its
form for TensorRT."""

from __future__ import annotations

import functools
import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from single_node import feeds, session, single_node_model

from lvlm.core.errors import ExportError, ParameterError
from lvlm.export.ops.causal_attention import OP
from lvlm.export.ops.op import DOMAIN, OPSET, VERSION, OpSample
from lvlm.export.targets import trt_rtx, trt_rtx_turing
from lvlm.export.targets.passes.graph_edits import decompose_attention, lower_ops
from lvlm.export.targets.target import Target
from lvlm.plugins_trt.engines.tensorrt_builder import BuildSettings, open_tensorrt
from lvlm.runtime.bundle.manifest import Capacity

ENGINES = ("torch", "onnx")
NAN = float("nan")
LAYOUTS = [(1, 1, 32), (2, 2, 64), (1, 3, 80), (2, 1, 96), (1, 2, 128)]  # key heads, group, width
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # query, key, value, length


def by_loops(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(output, importance); nothing is computed for padding."""
    query, key, value, length = (t.double().numpy() for t in case)
    batch, heads, extent, width = query.shape
    group = heads // key.shape[1]
    output, importance = np.zeros(query.shape), np.zeros((batch, extent))
    for b in range(batch):
        for h in range(heads):
            for i in range(int(length[b])):
                keys, values = (t[b, h // group, : i + 1] for t in (key, value))
                logits = [float(query[b, h, i] @ k) / math.sqrt(width) for k in keys]
                weights = np.array([math.exp(x - max(logits)) for x in logits])
                weights /= weights.sum()
                output[b, h, i] = weights @ values
                importance[b, : i + 1] += weights / heads
    return output, importance


@st.composite
def cases(draw: st.DrawFn) -> Case:
    key_heads, group, width = draw(st.sampled_from(LAYOUTS))
    batch, extent = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    lengths = [draw(st.integers(1, extent)) for _ in range(batch)]
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    query = 3 * torch.randn(batch, key_heads * group, extent, width, generator=random)
    key, value = torch.randn(2, batch, key_heads, extent, width, generator=random)
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    return query.to(dtype), key.to(dtype), value.to(dtype), torch.tensor(lengths)


def padding(case: Case) -> torch.Tensor:
    """[B, 1, N, 1] bool."""
    return (torch.arange(case[0].shape[2]) >= case[3][:, None])[:, None, :, None]


def sample(case: Case, importance: int, chunk: int = 4) -> OpSample:
    query, key, value, length = case
    attributes = {"scale": query.shape[3] ** -0.5, "chunk": chunk, "importance": importance}
    return OpSample("", (query, key, value, length if importance else None), attributes)


@functools.cache
def runner(
    layout: tuple[int, int, int], dtype: torch.dtype, importance: int, chunk: int
) -> onnxruntime.InferenceSession:
    key_heads, group, width = layout
    query = torch.zeros(1, key_heads * group, 1, width, dtype=dtype)
    key = torch.zeros(1, key_heads, 1, width, dtype=dtype)
    case = query, key, key, torch.ones(1, dtype=torch.int64)
    return session(single_node_model(OP, sample(case, importance, chunk)))


def run(case: Case, importance: int, engine: str, chunk: int = 4) -> list[np.ndarray]:
    query, key, _, _ = case
    given = sample(case, importance, chunk)
    if engine == "torch":
        return [t.numpy() for t in OP(*given.inputs, **given.attributes)]
    layout = (key.shape[1], query.shape[1] // key.shape[1], key.shape[3])
    return runner(layout, query.dtype, importance, chunk).run(None, feeds(OP, given))


@settings(max_examples=examples(100), deadline=None)
@given(cases(), st.sampled_from([2, 3, 128]))
def test_matches_loops(case: Case, chunk: int) -> None:
    """Prompts below, at and beyond whole chunks."""
    valid = ~padding(case).numpy()
    output, importance = by_loops(case)
    limit = 1e-5 if case[0].dtype == torch.float32 else 5e-3
    for engine in ENGINES:
        found = run(case, 1, engine, chunk)
        assert np.isfinite(found[0]).all()
        np.testing.assert_allclose(np.where(valid, found[0], 0), output, atol=limit)
        np.testing.assert_allclose(found[1], importance, atol=1e-5)


@settings(max_examples=examples(100), deadline=None)
@given(cases(), st.sampled_from([2, 3, 128]))
def test_asking_for_importance_changes_no_bit_of_the_output(case: Case, chunk: int) -> None:
    valid = ~padding(case).numpy()
    for engine in ENGINES:
        (alone,) = run(case, 0, engine, chunk)
        scored, _ = run(case, 1, engine, chunk)
        assert np.isfinite(alone).all()
        np.testing.assert_array_equal(np.where(valid, scored, 0), np.where(valid, alone, 0))
        np.testing.assert_array_equal(  # -0 and 0 are no longer equal
            np.signbit(np.where(valid, scored, 0)), np.signbit(np.where(valid, alone, 0))
        )


@settings(max_examples=examples(60), deadline=None)
@given(cases(), st.integers(0, 3))
def test_padding_and_other_rows_change_nothing(case: Case, more: int) -> None:
    hidden, big = padding(case), 1e3
    changed = tuple(t.masked_fill(hidden, big) for t in case[:3])
    longer = [torch.nn.functional.pad(t, (0, 0, 0, more), value=big) for t in changed]
    n = int(case[3][0])
    for engine in ENGINES:
        one = tuple(t[:1] for t in case)
        output, importance = run(one, 1, engine)
        found = run((longer[0], longer[1], longer[2], case[3]), 1, engine)
        assert np.isfinite(found[0]).all()
        np.testing.assert_allclose(found[0][:1, :, :n], output[:, :, :n], rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(found[1][:1, :n], importance[:, :n], atol=2e-6)
        assert not found[1][:1, n:].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_importance_shows_what_is_not_finite_in_valid_positions_only(engine: str) -> None:
    random = torch.Generator().manual_seed(0)
    query = torch.randn(4, 4, 6, 64, generator=random)
    key, value = torch.randn(2, 4, 2, 6, 64, generator=random)
    length = torch.tensor([5, 3, 3, 6])
    query[0, 3, 2, 5] = NAN
    query[1, 0, 4, 0] = NAN  # padding
    key[2, 0, 3, 7] = float("inf")  # padding
    key[3, 1, 4, 63] = NAN
    found = run((query, key, value, length), 1, engine)[1]
    finite = np.isfinite(found)
    assert not finite[0, :3].any()
    assert found[0, 5] == 0  # padding, even now
    assert finite[1].all()
    assert finite[2].all()
    assert not finite[3, :5].any()


@pytest.mark.parametrize("extent", [127, 128, 129, 300])
def test_default_chunk(extent: int) -> None:
    random = torch.Generator().manual_seed(extent)
    query = 2 * torch.randn(2, 6, extent, 64, generator=random)
    key, value = torch.randn(2, 2, 3, extent, 64, generator=random)
    case = query, key, value, torch.tensor([extent, extent - 50])
    expected, found = run(case, 1, "torch", 128), run(case, 1, "onnx", 128)
    valid = ~padding(case).numpy()
    np.testing.assert_allclose(found[0] * valid, expected[0] * valid, atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=2e-6, atol=2e-6)


def graph(case: Case, read: bool, extra: list[onnx.NodeProto]) -> ir.Model:
    """A scored CausalAttention whose importance is an output, or is not read by anything."""
    model = single_node_model(OP, sample(case, 1))
    if not read:
        del model.graph.output[1]
    model.graph.node.extend(extra)
    return ir.serde.deserialize_model(model)


def ragged() -> Case:
    random = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, 2, 2, 40, 32, generator=random)
    query = torch.randn(2, 4, 40, 32, generator=random)
    return query, key, value, torch.tensor([40, 17])


@pytest.mark.parametrize("read", [True, False])
def test_lowered_form_scores_beside_attention_only_what_is_read(read: bool) -> None:
    case = ragged()
    expected = run(case, 1, "torch")
    model = graph(case, read, [])
    lower_ops(model, plugins=True)
    assert decompose_attention(model) == 1  # its shapes are known after the pass
    assert ("CacheImportance" in {n.op_type for n in model.graph}) == read
    assert ("CacheImportance" in {f.name for f in model.functions.values()}) == read
    assert "CausalAttention" not in {f.name for f in model.functions.values()}
    assert_same(model, case, expected[: 1 + read])


@pytest.mark.parametrize("extent", [40, 5])  # 16 chunks of 3 with padding; fewer rows than chunks
def test_lowered_form_without_plugins_is_one_loop(extent: int) -> None:
    query, key, value, length = ragged()
    cut = [t[:, :, :extent] for t in (query, key, value)]
    for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 3e-3)):
        case = (cut[0].to(dtype), cut[1].to(dtype), cut[2].to(dtype), length.clamp(max=extent))
        model = graph(case, True, [])
        lower_ops(model, plugins=False)
        kinds = [n.op_type for n in model.graph]
        assert kinds.count("Scan") == 1
        assert "Attention" not in kinds
        assert not model.functions
        assert_same(model, case, run(case, 1, "torch"), limit)


def assert_same(
    model: ir.Model, case: Case, expected: list[np.ndarray], limit: float = 1e-5
) -> None:
    valid = ~padding(case).numpy()
    found = session(ir.to_proto(model)).run(None, feeds(OP, sample(case, 1)))
    assert len(found) == len(expected)
    np.testing.assert_allclose(found[0] * valid, expected[0] * valid, atol=limit)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


LAYERS = """<ir_version: 11, opset_import: ["" : 24, "lvlm" : 1]>
g (T[B, 4, N, 64] q, T[B, 2, N, 64] k, T[B, 2, N, 64] v, int64[B] length)
    => (T[B, 4, N, 64] z, float[B, N] scores) <T[B, 4, N, 64] x, T[B, 4, N, 64] y>
{
    x, first = lvlm.CausalAttention <scale = 0.125, importance = 1> (q, k, v, length)
    y, second = lvlm.CausalAttention <scale = 0.125, importance = 1> (x, k, v, length)
    z, scores = lvlm.CausalAttention <scale = 0.125, importance = 1> (y, k, v, length)
}"""


@pytest.mark.slow
@pytest.mark.parametrize("target", [trt_rtx_turing.TARGET, trt_rtx.TARGET], ids=lambda t: t.name)
def test_layers_that_score_build_for_tensorrt_rtx(target: Target) -> None:
    """Beside loops the builder has no kernel for attention, or ends the process."""
    pytest.importorskip("tensorrt_rtx")
    dtype = "bfloat16" if "bfloat16" in target.matmul_types else "float16"
    model = ir.from_onnx_text(LAYERS.replace("T[", f"{dtype}["))
    target.lower(model, Capacity(1, 1, ()))
    assert "Attention" not in {node.op_type for node in model.graph}
    extents = {"q": (4, 64), "k": (2, 64), "v": (2, 64)}
    shapes = {
        n: [(b, h, r, d) for b, r in ((1, 1), (1, 20), (2, 40))] for n, (h, d) in extents.items()
    }
    built = open_tensorrt("tensorrt-rtx").build(
        ir.to_proto(model).SerializeToString(),
        BuildSettings({**shapes, "length": ((1,), (1,), (2,))}, sms=(target.sms[0],)),
    )
    assert built.engine.nbytes > 0


def test_lowered_form_refuses_another_variant_beside_it() -> None:
    inputs = ["query", "key", "slots", "length"]
    slots = helper.make_tensor_value_info("slots", onnx.TensorProto.INT64, ["B", "N"])
    model = single_node_model(OP, sample(ragged(), 1))
    model.graph.input.append(slots)
    model.graph.node.append(
        helper.make_node("CacheImportance", inputs, ["own"], domain=DOMAIN, scale=1.0, chunk=32)
    )
    model.graph.output.append(helper.make_tensor_value_info("own", onnx.TensorProto.FLOAT, None))
    assert model.opset_import[0].version == OPSET
    assert model.opset_import[1].version == VERSION
    with pytest.raises(ExportError, match="two variants of CacheImportance in one graph"):
        lower_ops(ir.serde.deserialize_model(model), plugins=True)


def test_what_does_not_fit_is_refused() -> None:
    query, key, length = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8), torch.tensor([3])
    with pytest.raises(ParameterError, match="do not fit"):
        OP(query, key, key[:, :, :2], scale=1.0)
    with pytest.raises(ParameterError, match="do not fit"):
        OP(query[:, :, :2], key, key, scale=1.0)
    with pytest.raises(ParameterError, match="3 query heads are no multiple of 2 key heads"):
        OP(query[:, :3], key, key, scale=1.0)
    with pytest.raises(ParameterError, match="importance=1, and it alone, takes length"):
        OP(query, key, key, length, scale=1.0)
    with pytest.raises(ParameterError, match="importance=1, and it alone, takes length"):
        OP(query, key, key, scale=1.0, importance=1)
    with pytest.raises(ParameterError, match="chunk is 0, at least 1 is needed"):
        OP(query, key, key, scale=1.0, chunk=0)
