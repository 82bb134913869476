"""Lowered graphs compute what the canonical ones compute, on ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from lowering_tools import FORMS, OPS, SMALL, TARGETS, graph_of, in_place, logits, lowered
from settings import CACHED
from single_node import feeds, session, single_node_model

from lvlm.export.ops.op import OPSET, Op, OpSample
from lvlm.export.targets.target import Target
from lvlm.plugins_trt.engines.tensorrt_builder import BuildSettings, open_tensorrt
from lvlm.runtime.bundle.manifest import Capacity
from lvlm.runtime.engine import calls

PORTABLE = [dataclasses.replace(t, name=f"{n}-portable", plugins=False) for n, t in FORMS.items()]
SAME = {
    **{name: t for name, t in FORMS.items() if "float32" in t.matmul_types},
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


def test_scored_prompts_compute_the_same(
    bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One plugin for attention and what it gives every entry."""
    original = bundle("digits-llava", *CACHED["elastic-cache (cached)"], max_images=2)
    target = TARGETS["jetson-orin-jp62"]
    folder = lowered(original, tmp_path / "bundle", target)
    kinds = [n.op_type for n in onnx.load(folder / target.file("prefill.onnx"),
                                          load_external_data=False).graph.node]  # fmt: skip
    assert "ScoredAttention" in kinds
    assert not {"Attention", "CacheAttention", "CacheImportance", "Softmax"} & set(kinds)
    in_place(folder, target)
    expected = logits(original)
    monkeypatch.setattr(calls, "CAPACITY_STEP", 10**6)
    for ours, theirs in zip(logits(folder), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("name", ["jetson-orin-jp62", "trt-rtx"])
def test_lowered_fp16_graphs_compute_the_same(
    name: str, bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decomposed attention has its softmax in fp32."""
    original = bundle("digits-llava", dtype="fp16", max_images=2)
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
        ir.to_proto(model).SerializeToString(), BuildSettings(shapes, sms=(86,))
    )
    assert built.engine.nbytes > 0
