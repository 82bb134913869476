"""Ops written out for targets that lack them, and opsets that are older."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from lowering_tools import graph_of
from single_node import session

from lvlm.core.errors import ExportError
from lvlm.export.targets.passes.decomposed import decompose_normalization, decompose_rotary
from lvlm.export.targets.passes.fp16_matmuls import fp16_matmuls
from lvlm.export.targets.passes.graph_edits import (
    LOWERED_DOMAIN,
    decompose_attention,
    lower_opset,
)


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


@pytest.mark.parametrize("kind", KINDS)
def test_attention_that_caps_is_written_out_everywhere(kind: str) -> None:
    """Also where attention that does not stays as it is; logits are capped before they are
    masked."""
    dtype, tolerance = KINDS[kind]
    body = "y = Attention <scale = 0.5, softcap = 0.7> (q, k, v, mask)"
    given = (
        f"{kind}[B, 4, N, 8] q, {kind}[B, 2, S, 8] k, {kind}[B, 2, S, 8] v, bool[B, 1, N, S] mask"
    )
    model, plain = (
        graph_of(text, given, f"{kind}[B, 4, N, 8] y")
        for text in (body, body.replace(", softcap = 0.7", ""))
    )
    random = np.random.default_rng(0)
    shapes = {"q": (2, 4, 3, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 8)}
    feed = {name: (2 * random.normal(size=x)).astype(dtype) for name, x in shapes.items()}
    feed["mask"] = random.random((2, 1, 3, 5)) < 0.7
    feed["mask"][..., 0] = True
    (expected,), (uncapped,) = (session(ir.to_proto(m)).run(None, feed) for m in (model, plain))
    assert np.abs(uncapped - expected).max() > 0.1
    every = {"float32", "float16"}
    assert decompose_attention(plain, every) == 0
    assert decompose_attention(model, every) == 1
    (found,) = session(ir.to_proto(model)).run(None, feed)
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
