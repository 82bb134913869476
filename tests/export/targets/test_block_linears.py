"""Linear layers by weights in blocks: the kernel computes what ONNX Runtime's MatMulNBits does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from cpu_kernels import BUILDS, make_build
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from lvlm.export.ops.op import OPSET
from lvlm.export.targets.passes.block_linears import FP32, block_linear
from lvlm.export.targets.passes.graph_edits import LOWERED_DOMAIN
from lvlm.export.targets.passes.ort_fusions import MICROSOFT

FLOAT = onnx.TensorProto.FLOAT


def quantized(
    depth: int, columns: int, block: int, zeroed: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs, as a graph has them, and the weights [K,N] that they stand for."""
    random = np.random.default_rng(depth + columns)
    numbers = random.integers(0, 256, (columns, depth // block, block), dtype=np.uint8)
    scales = random.normal(size=(columns, depth // block)).astype(np.float32)
    zeros = random.integers(0, 256, (columns, depth // block), dtype=np.uint8)
    less = (zeros if zeroed else np.full_like(zeros, 128))[..., None]
    weights = (numbers.astype(float) - less) * scales[..., None]
    inputs = {"numbers": numbers, "scales": scales} | ({"zeros": zeros} if zeroed else {})
    return inputs, weights.reshape(columns, depth).T


def session(
    inputs: dict[str, np.ndarray],
    attributes: dict[str, int],
    library: Path | None,
    *,
    constant: bool = True,
    threads: int = 1,
) -> onnxruntime.InferenceSession:
    """With the library without the function: only the kernel can do it."""
    function = block_linear("zeros" in inputs)
    node = helper.make_node(
        function.name, ["x", *inputs], ["y"], domain=LOWERED_DOMAIN, **attributes
    )
    described = [helper.make_tensor_value_info("x", FLOAT, ["rows", None])]
    initializers = []
    for name, array in inputs.items():
        if constant:
            initializers.append(numpy_helper.from_array(array, name))
        else:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            described.append(helper.make_tensor_value_info(name, kind, array.shape))
    graph = helper.make_graph(
        [node], "g", described, [helper.make_tensor_value_info("y", FLOAT, None)], initializers
    )
    domains = (("", OPSET), (LOWERED_DOMAIN, 1), (MICROSOFT, 1))
    model = helper.make_model(
        graph,
        functions=[] if library else [function],
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in domains],
        ir_version=11,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


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
        made = session(inputs, attributes, kernels, constant=constant, threads=threads)
        (found,) = made.run(None, feeds)
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
        (found,) = session(inputs, attributes, library).run(None, {"x": x})
        np.testing.assert_allclose(found, x @ weights, rtol=0, atol=0.02)  # sums of some thousands


@pytest.mark.parametrize("zeroed", [False, True])
def test_kernel_computes_the_function(zeroed: bool, kernels: Path) -> None:
    inputs, _ = quantized(128, 50, 32, zeroed)
    attributes = {"K": 128, "N": 50, "bits": 8, "block_size": 32, "accuracy_level": FP32}
    feeds = {"x": np.random.default_rng(0).normal(size=(9, 128)).astype(np.float32)}
    (expected,) = session(inputs, attributes, None).run(None, feeds)
    (found,) = session(inputs, attributes, kernels).run(None, feeds)
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
        session(inputs, attributes, kernels)
