"""Every kernel of the CPU library on what its op is checked on: nodes, and what they must give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from kernel_driver import Run
from lowered_nodes import (
    CACHED_NODES,
    EXTENDED,
    IN_PLACE,
    assert_entries,
    block_linear_model,
    cached_inputs,
    cached_model,
    extended_inputs,
    extended_model,
    linear_model,
    quantized,
    tolerance_of,
)
from single_node import assert_close, feeds, session, single_node_model

from lvlm.core.discovery import discover
from lvlm.export.ops.op import Op, OpSample
from lvlm.runtime.backends.ort.kernels.kernel_library import SOURCES

OPS: dict[str, Op] = discover("lvlm.export.ops", "OP")
LONG = [(3, 1, 64), (4, 4, 40), (7, 1, 32)]  # query heads, key heads, head size of long prompts
# rows, depth, columns: less than a vector, a panel and more, two blocks of the depth, many tasks
LINEARS = [(1, 1, 1), (2, 64, 33), (7, 1025, 100), (13, 40, 16), (200, 64, 300)]
NOWHERE: Mapping[str, str] = MappingProxyType({})  # outputs of their own


@dataclass(frozen=True)
class KernelCase:
    """``check`` fails unless outputs are right."""

    name: str
    run: Run
    check: Callable[[Sequence[np.ndarray]], None]


def kernel_ops() -> Iterator[Op]:
    """Those of which the library has a kernel: a file each."""
    for name, op in OPS.items():
        snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in name).strip("_")
        if (SOURCES / f"{snake}.cpp").exists():
            yield op


def long_prompts(heads: int, key_heads: int, width: int) -> OpSample:
    """Of CausalAttention: many blocks, and more keys than one product takes."""
    random = torch.Generator().manual_seed(heads)
    query = torch.randn(2, heads, 530, width, generator=random)
    key, value = torch.randn(2, 2, key_heads, 530, width, generator=random)
    length = torch.tensor([530, 201])
    padding = (torch.arange(530) >= length[:, None])[:, None, :, None]
    attributes = {"scale": 0.2, "importance": 1}
    return OpSample("long", (query, key, value, length), attributes, {"output": padding})


def kernel_cases() -> Iterator[KernelCase]:
    for op in kernel_ops():
        for sample in op.samples():
            yield _of_sample(op, sample)
    for heads in LONG:
        yield _of_sample(OPS["CausalAttention"], long_prompts(*heads))
    for sample in OPS["CacheUpdate"].samples():
        yield _of_sample(OPS["CacheUpdate"], sample, {"updated": "cache"})
    for sizes in LINEARS:
        for constant in (True, False):
            for transposed in (True, False):
                yield _linear(*sizes, transposed, constant)
    for rows, blocks, columns in [(1, 3, 33), (3, 1, 31), (40, 33, 100), (1, 1, 1)]:
        for constant in (True, False):
            for zeroed in (True, False):
                yield _block_linear(rows, blocks * 32, columns, zeroed, constant)
    for in_place in (NOWHERE, IN_PLACE):
        for name, case in CACHED_NODES:
            yield _cached(name, case, in_place)
        for case in EXTENDED:
            for slots in ("in order", "anywhere"):
                yield _extended(case, slots, in_place)


def _of_sample(op: Op, sample: OpSample, in_place: Mapping[str, str] = NOWHERE) -> KernelCase:
    run = Run(single_node_model(op, sample, function=False), feeds(op, sample), in_place)
    return KernelCase(f"{op.name}: {sample.name}", run, lambda got: assert_close(op, sample, got))


def _linear(rows: int, depth: int, columns: int, transposed: bool, constant: bool) -> KernelCase:
    random = np.random.default_rng(depth)
    x = random.normal(size=(rows, depth)).astype(np.float32)
    weight = random.normal(size=(depth, columns)).astype(np.float32)
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    model = linear_model(stored, transposed=transposed, constant=constant)
    run = Run(model, {"x": x, "weight": stored})
    name = f"{model.graph.name}: {rows}x{depth}x{columns}, constant {constant}"
    return KernelCase(name, run, lambda got: _check_product(x, weight, got))


def _block_linear(rows: int, depth: int, columns: int, zeroed: bool, constant: bool) -> KernelCase:
    stored, weight = quantized(depth, columns, 32, zeroed)
    x = np.random.default_rng(rows).normal(size=(rows, depth)).astype(np.float32)
    sizes = {"K": depth, "N": columns, "bits": 8, "block_size": 32}
    model = block_linear_model(stored, sizes, constant=constant)
    name = f"{model.graph.name}: {rows}x{depth}x{columns}, constant {constant}"
    run = Run(model, {"x": x} | stored)
    return KernelCase(name, run, lambda got: _check_product(x, weight, got))


def _check_product(x: np.ndarray, weight: np.ndarray, got: Sequence[np.ndarray]) -> None:
    """Each sum as exact as its terms are large."""
    terms = np.abs(x).astype(float) @ np.abs(weight)
    assert got[0].shape == terms.shape
    assert (np.abs(got[0] - x.astype(float) @ weight) <= 3e-6 * terms).all()


def _cached(name: str, case: tuple[object, ...], in_place: Mapping[str, str]) -> KernelCase:
    given = cached_inputs(name, case)
    expected = session(cached_model(name, given, case, function=True)).run(None, given)
    valid = given["last"] + 1
    tolerance = tolerance_of(case, 2e-3)

    def check(got: Sequence[np.ndarray]) -> None:
        np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=tolerance)
        for have, want in zip(got[1:], expected[1:], strict=True):
            for row, count in enumerate(valid):  # what lies beyond the valid means nothing
                assert_entries(have[row, :, :count], want[row, :, :count], tolerance)

    run = Run(cached_model(name, given, case), given, in_place)
    return KernelCase(f"{name}: {case}", run, check)


def _extended(case: tuple[object, ...], slots: str, in_place: Mapping[str, str]) -> KernelCase:
    given = extended_inputs(case, slots)
    expected = session(extended_model(given, case, function=True)).run(None, given)
    atol = 4e-3 if case[4] == "float16" else tolerance_of(case, 4e-3)

    def check(got: Sequence[np.ndarray]) -> None:
        for have, want in zip(got, expected, strict=True):
            assert_entries(have, want, atol)

    run = Run(extended_model(given, case), given, in_place)
    return KernelCase(f"ExtendAttention: {case}, slots {slots}", run, check)
