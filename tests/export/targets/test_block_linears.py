"""Linear layers by weights in blocks: the kernel computes what ONNX Runtime's MatMulNBits does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cpu_kernels import BUILDS, make_build
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered_nodes import block_linear_model, quantized
from single_node import session

from lvlm.export.targets.passes.block_linears import FP32


@settings(max_examples=30)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 6, 7, 12, 13, 40, 100]),
    blocks=st.sampled_from([(32, 1), (32, 3), (16, 5), (64, 17), (128, 9), (1056, 1)]),
    columns=st.sampled_from([1, 16, 31, 32, 33, 100]),
    zeroed=st.booleans(),
    constant=st.booleans(),
)
def test_kernel_multiplies(
    rows: int,
    blocks: tuple[int, int],
    columns: int,
    zeroed: bool,
    constant: bool,
    kernels: Path,
) -> None:
    block, depth = blocks[0], blocks[0] * blocks[1]
    inputs, weights = quantized(depth, columns, block, zeroed)
    attributes = {"K": depth, "N": columns, "bits": 8, "block_size": block}
    x = np.random.default_rng(rows).normal(size=(rows, depth)).astype(np.float32)
    feeds = {"x": x} | ({} if constant else inputs)

    def run(threads: int) -> np.ndarray:
        model = block_linear_model(inputs, attributes, constant=constant)
        (found,) = session(model, kernels, threads).run(None, feeds)
        return np.asarray(found)

    found = run(1)
    terms = np.abs(x).astype(float) @ np.abs(weights)
    assert found.shape == (rows, columns)
    assert (np.abs(found - x.astype(float) @ weights) <= 3e-6 * terms + 1e-30).all()
    np.testing.assert_array_equal(found, run(3))


@pytest.mark.parametrize("build", BUILDS)
def test_every_build(build: str, shared: Path, pytestconfig: pytest.Config) -> None:
    library = make_build(build, shared, pytestconfig)
    for rows, zeroed in [(1, False), (2, True), (40, True), (40, False)]:
        inputs, weights = quantized(96, 50, 32, zeroed)
        attributes = {"K": 96, "N": 50, "bits": 8, "block_size": 32}
        x = np.random.default_rng(rows).normal(size=(rows, 96)).astype(np.float32)
        model = block_linear_model(inputs, attributes)
        (found,) = session(model, library).run(None, {"x": x})
        np.testing.assert_allclose(found, x @ weights, rtol=0, atol=0.02)  # sums of some thousands


@pytest.mark.parametrize("zeroed", [False, True])
def test_kernel_computes_the_function(zeroed: bool, kernels: Path) -> None:
    inputs, _ = quantized(128, 50, 32, zeroed)
    attributes = {"K": 128, "N": 50, "bits": 8, "block_size": 32, "accuracy_level": FP32}
    feeds = {"x": np.random.default_rng(0).normal(size=(9, 128)).astype(np.float32)}
    whole = block_linear_model(inputs, attributes, function=True)
    (expected,) = session(whole).run(None, feeds)
    (found,) = session(block_linear_model(inputs, attributes), kernels).run(None, feeds)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)  # sums of some hundreds


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"N": 49}, "numbers, scales and zero points do not fit"),
        ({"block_size": 24}, "weights are of 8 bits in blocks of a size that divides"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    changed: dict[str, int], message: str, kernels: Path
) -> None:
    inputs, _ = quantized(128, 50, 32, False)
    attributes = {"K": 128, "N": 50, "bits": 8, "block_size": 32} | changed
    with pytest.raises(Exception, match=rf"lvlm\.lowered::BlockLinear: {message}"):
        session(block_linear_model(inputs, attributes), kernels)
