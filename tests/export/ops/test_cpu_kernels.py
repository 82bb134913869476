"""The library of CPU kernels: every kernel keeps its op's contract."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from cpu_kernels import BUILDS, make_build
from kernel_cases import LONG, OPS, kernel_ops, long_prompts
from single_node import assert_close, feeds, session, single_node_model

from lvlm.export.ops.op import Op, OpSample

SAMPLES = [
    pytest.param(op, s, id=f"{op.name}: {s.name}") for op in kernel_ops() for s in op.samples()
]


@functools.cache
def native(library: Path, model: bytes, threads: int) -> onnxruntime.InferenceSession:
    return session(onnx.load_model_from_string(model), library, threads)


def run(library: Path, op: Op, sample: OpSample, threads: int = 1) -> list[np.ndarray]:
    """Without the function: only a kernel can do it."""
    model = single_node_model(op, sample, function=False)
    made = native(library, model.SerializeToString(), threads)
    found: list[np.ndarray] = made.run(None, feeds(op, sample))
    return found


def test_there_are_kernels() -> None:
    assert {"CausalAttention", "CacheUpdate"} <= {op.name for op in kernel_ops()}


@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_kernel_computes_the_reference(op: Op, sample: OpSample, kernels: Path) -> None:
    assert_close(op, sample, run(kernels, op, sample))


@pytest.mark.parametrize(("heads", "key_heads", "width"), LONG)
def test_long_prompts_whatever_the_threads(
    heads: int, key_heads: int, width: int, kernels: Path
) -> None:
    sample = long_prompts(heads, key_heads, width)
    op = OPS["CausalAttention"]
    found = run(kernels, op, sample)
    assert_close(op, sample, found)
    for one, more in zip(found, run(kernels, op, sample, 3), strict=True):
        np.testing.assert_array_equal(one, more)


@pytest.mark.parametrize("op", list(kernel_ops()), ids=lambda op: op.name)
@pytest.mark.parametrize("build", BUILDS)
def test_every_build(op: Op, build: str, shared: Path, pytestconfig: pytest.Config) -> None:
    library = make_build(build, shared, pytestconfig)
    for sample in op.samples():
        assert_close(op, sample, run(library, op, sample))


def test_a_kernel_refuses_what_does_not_fit_in_one_line(kernels: Path) -> None:
    sample = next(OPS["CacheUpdate"].samples())
    given = feeds(OPS["CacheUpdate"], sample)
    given["index"] = given["index"] + 100
    model = single_node_model(OPS["CacheUpdate"], sample)
    made = native(kernels, model.SerializeToString(), 1)
    with pytest.raises(Exception, match="lvlm::CacheUpdate: entries go beyond the cache"):
        made.run(None, given)
