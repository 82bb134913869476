"""Linear layers in the target ort-cpu: nodes of their own, whose kernel computes their function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from cpu_kernels import BUILDS, make_build
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered_nodes import linear_model
from single_node import session

from lvlm.export.targets.passes.graph_edits import LOWERED_DOMAIN
from lvlm.export.targets.passes.ort_linears import use_linears


def values(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def loaded(
    weight: np.ndarray,
    library: Path,
    *,
    transposed: bool = False,
    constant: bool = True,
    threads: int = 1,
    rank: int = 2,
) -> onnxruntime.InferenceSession:
    """Without the function: only the kernel can do it. Constant weights stay where they are."""
    # Other values: those of ``weight`` take their place
    stored = np.zeros_like(weight) if constant else weight
    model = linear_model(stored, transposed=transposed, constant=constant, rank=rank)
    held = onnxruntime.OrtValue.ortvalue_from_numpy(weight)  # of the array's own memory
    made = session(model, library, threads, {"weight": held} if constant else {})
    made.held = held  # as long as the session
    return made


def check(x: np.ndarray, weight: np.ndarray, found: np.ndarray) -> None:
    """Each sum as exact as its terms are large."""
    expected = x.astype(np.float64) @ weight
    terms = np.abs(x).astype(np.float64) @ np.abs(weight)
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= 1e-6 * terms + 1e-30).all()


@settings(max_examples=30)
@given(
    rows=st.sampled_from([0, 1, 2, 5, 7, 11, 12, 13, 24, 32, 97, 200]),
    depth=st.sampled_from([1, 3, 64, 1000, 1024, 1025, 2100]),
    columns=st.sampled_from([1, 15, 16, 31, 32, 33, 100, 300]),
    transposed=st.booleans(),
    constant=st.booleans(),
)
def test_kernel_multiplies(
    rows: int, depth: int, columns: int, transposed: bool, constant: bool, kernels: Path
) -> None:
    x, weight = values(rows, rows, depth), values(columns, depth, columns)
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    feeds = {"x": x} | ({} if constant else {"weight": stored})

    def run(threads: int) -> np.ndarray:
        made = loaded(stored, kernels, transposed=transposed, constant=constant, threads=threads)
        (found,) = made.run(None, feeds)
        return np.asarray(found)

    found = run(1)
    check(x, weight, found)
    np.testing.assert_array_equal(found, run(3))


@pytest.mark.parametrize("build", BUILDS)
def test_every_build(build: str, shared: Path, pytestconfig: pytest.Config) -> None:
    library = make_build(build, shared, pytestconfig)
    for rows, depth, columns in [(1, 64, 33), (7, 1025, 100), (200, 64, 300)]:
        x, weight = values(rows, rows, depth), values(columns, depth, columns)
        check(x, weight, loaded(weight, library).run(None, {"x": x})[0])


def test_rows_may_have_any_number_of_axes(kernels: Path) -> None:
    weight = values(1, 40, 50)
    for shape in [(40,), (3, 40), (2, 3, 40), (2, 1, 3, 40), (2, 0, 40)]:
        x = values(2, *shape)
        (found,) = loaded(weight, kernels, rank=len(shape)).run(None, {"x": x})
        check(x, weight, found)


def test_what_is_not_finite_stays_in_its_row_or_column(kernels: Path) -> None:
    x, weight = values(3, 40, 64), values(4, 64, 40)
    x[5, 7], weight[9, 11] = np.nan, np.inf
    (found,) = loaded(weight, kernels).run(None, {"x": x})
    odd = ~np.isfinite(found)
    assert odd[5].all()
    assert odd[:, 11].all()
    assert odd.sum() == 40 + 40 - 1


def test_what_is_packed_lives_no_longer_than_its_sessions(kernels: Path) -> None:
    """By address: other weights that come to lie there later are packed anew."""
    weight, x = values(5, 64, 32), values(6, 2, 64)
    first = loaded(weight, kernels)
    second = loaded(weight, kernels)
    (one,), (other,) = first.run(None, {"x": x}), second.run(None, {"x": x})
    del first
    np.testing.assert_array_equal(one, other)
    check(x, weight, second.run(None, {"x": x})[0])
    del second
    weight += 1
    (found,) = loaded(weight, kernels).run(None, {"x": x})
    check(x, weight, found)


def test_the_other_layout_at_the_same_place_is_another(kernels: Path) -> None:
    weight, x = values(7, 48, 48), values(8, 3, 48)
    made = [loaded(weight, kernels, transposed=transposed) for transposed in (False, True)]
    check(x, weight, made[0].run(None, {"x": x})[0])
    check(x, weight.T, made[1].run(None, {"x": x})[0])


@pytest.mark.parametrize("transposed", [False, True])
def test_other_weights_at_the_same_place_are_packed_anew(transposed: bool, kernels: Path) -> None:
    """Though what was packed is still held: by a session whose weights are gone before it is, when
    another thread loads a model."""
    weight, x = values(7, 48, 48), values(8, 3, 48)
    first = loaded(weight, kernels, transposed=transposed)
    expected = first.run(None, {"x": x})[0]
    weight[47, 47] += 1
    second = loaded(weight, kernels, transposed=transposed)
    check(x, weight.T if transposed else weight, second.run(None, {"x": x})[0])
    np.testing.assert_array_equal(first.run(None, {"x": x})[0], expected)


def test_sums_of_nothing_are_zero(kernels: Path) -> None:
    for transposed in (False, True):
        made = loaded(
            np.zeros((5, 0) if transposed else (0, 5), np.float32), kernels, transposed=transposed
        )
        y = np.full((3, 5), np.nan, np.float32)
        binding = made.io_binding()
        binding.bind_cpu_input("x", np.zeros((3, 0), np.float32))
        binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
        made.run_with_iobinding(binding)
        np.testing.assert_array_equal(y, 0)


def test_what_does_not_fit_is_refused_in_one_line(kernels: Path) -> None:
    with pytest.raises(Exception, match=r"lvlm\.lowered::Linear: input and weights do not fit"):
        loaded(values(1, 40, 50), kernels).run(None, {"x": values(2, 3, 41)})


def lowered(body: str, dtype: str = "float") -> Counter[str]:
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["": 24]>
        g ({dtype}[n, 4] x, {dtype}[4, 4] other) => ({dtype}[n, 4] y)
        <{dtype}[4, 4] w = {{1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}},
         {dtype}[2, 4, 4] many, {dtype}[4] bias = {{1, 2, 3, 4}}> {{ {body} }}"""
    )
    count = use_linears(model)
    kinds = Counter(node.op_type for node in model.graph)
    assert (
        count
        == kinds["Linear"] + kinds["TransposedLinear"]
        == len([node for node in model.graph if node.domain == LOWERED_DOMAIN])
    )
    onnx.checker.check_model(ir.to_proto(model))
    return kinds


def test_products_with_weights_are_linear_layers() -> None:
    assert lowered("y = MatMul(x, w)") == {"Linear": 1}
    assert lowered("y = Gemm <transB = 1> (x, w)") == {"TransposedLinear": 1}
    assert lowered("a = MatMul(x, w) y = MatMul(a, w)") == {"Linear": 2}


@pytest.mark.parametrize(
    "body",
    [
        "y = MatMul(x, other)",
        "t = Transpose(w) y = MatMul(x, t)",
        "y = Gemm (x, w)",
        "y = Gemm <transB = 1> (x, w, bias)",
        "y = Gemm <transB = 1, alpha = 0.5> (x, w)",
    ],
)
def test_others_are_left(body: str) -> None:
    assert set(lowered(body)) <= {"MatMul", "Gemm", "Transpose"}


def test_other_types_are_left() -> None:
    assert lowered("y = MatMul(x, w)", "float16") == {"MatMul": 1}


def test_graphs_of_a_bundle_have_them(bundle: Callable[..., Path]) -> None:
    folder = bundle("digits-llava", max_images=2)
    for graph in ("prefill", "decode", "extend"):
        model = onnx.load(folder / f"{graph}.ort-cpu.onnx", load_external_data=False)
        kinds = Counter(node.op_type for node in model.graph.node)
        assert (kinds["MatMul"], kinds["Gemm"]) == (0, 0)
        assert kinds["Linear"] + kinds["TransposedLinear"] > 4
