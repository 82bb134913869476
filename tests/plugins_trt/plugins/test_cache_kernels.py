"""The kernels of ``CacheCompact`` and ``CacheUpdate`` on generated inputs, against the references:
what is copied bit by bit, means within the ops' tolerance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm.core.errors import ParameterError
from lvlm.export.ops import cache_update
from lvlm.export.ops.cache_compact import contract as cache_compact
from lvlm.plugins_trt.plugins.plan_runner import run
from lvlm.plugins_trt.plugins.plugin_plan import Plugin
from lvlm.plugins_trt.plugins.registry import plugins

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (32, 64, 80, 96, 128, 36, 33)  # the last two: rows that are not aligned
# Few values, so that ties are everywhere; both zeros, a denormal number, the largest ones.
SCORES = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 3.4e38, -3.4e38)
LONG = (("evict", torch.float16), ("merge", torch.bfloat16))
WILD = (NAN, INF, -INF)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def computed(name: str, device: torch.device, *inputs: torch.Tensor, **given: Any) -> list[Any]:
    plugin: Plugin = plugins()[name]
    return [t.cpu() for t in run(plugin, [t.to(device) for t in inputs], given)]


@dataclass(frozen=True)
class Case:
    key: torch.Tensor
    value: torch.Tensor
    importance: torch.Tensor
    lengths: list[int]
    budgets: list[int]
    extent: int  # of slots
    mode: str = "merge"
    sinks: int = 1
    recent: int = 1

    def check(self, device: torch.device) -> list[torch.Tensor]:
        """Run both, compare, give what the kernels gave."""
        counts = [torch.tensor(self.lengths), torch.tensor(self.budgets), torch.arange(self.extent)]
        inputs = (self.key, self.value, self.importance, *counts)
        chosen = {"mode": self.mode, "sinks": self.sinks, "recent": self.recent}
        found = computed("CacheCompact", device, *inputs, **chosen)
        right = cache_compact.OP(*inputs, **chosen)
        assert torch.equal(found[2], right[2])
        assert torch.equal(found[3], right[3])
        limit = cache_compact.OP.tolerance[self.key.dtype]
        for have, want in zip(found[:2], right[:2], strict=True):
            assert (have.shape, have.dtype) == (want.shape, want.dtype)
            if self.mode == "evict":
                assert torch.equal(bits(have), bits(want))
            else:
                torch.testing.assert_close(have, want, rtol=limit, atol=limit, equal_nan=True)
        return found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.one_of(st.integers(1, 9), st.integers(1, 150)), min_size=1,
                            max_size=3))  # fmt: skip
    sinks, recent = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    budgets = [draw(st.integers(max(1, min(n, sinks + recent)), n)) for n in lengths]
    extent = max(lengths) + draw(st.integers(0, 3))
    heads = draw(st.integers(1, 3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shape = (len(lengths), heads, extent)
    key = torch.randn(*shape, draw(st.sampled_from(WIDTHS)), generator=random)
    value = torch.randn(*shape, draw(st.sampled_from(WIDTHS)), generator=random)
    some = draw(st.lists(st.sampled_from(SCORES), min_size=1, max_size=4))
    if draw(st.integers(0, 3)) == 0:
        some.append(draw(st.sampled_from(WILD)))
    pick = torch.randint(len(some), (len(lengths), extent), generator=random)
    importance = torch.tensor(some)[pick]
    padding = torch.arange(extent) >= torch.tensor(lengths)[:, None]
    importance[padding] = draw(st.sampled_from((NAN, INF, 9.0)))
    key, value = (t.masked_fill(padding[:, None, :, None], NAN) for t in (key, value))
    dtype = draw(st.sampled_from(DTYPES))
    slots = draw(st.integers(max(budgets), extent))
    mode = draw(st.sampled_from(("evict", "merge")))
    return Case(key.to(dtype), value.to(dtype), importance, lengths, budgets, slots, mode,
                sinks, recent)  # fmt: skip


@settings(max_examples=examples(20), deadline=None)
@given(case=cases())
def test_compact_is_the_reference(gpu: torch.device, case: Case) -> None:
    case.check(gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"mode", "long"} <= set(metafunc.fixturenames):
        whole = metafunc.config.getoption("--whole")
        metafunc.parametrize(("mode", "long"), LONG if whole else LONG[:1])


def test_more_survivors_than_topk_takes(gpu: torch.device, mode: str, long: torch.dtype) -> None:
    """TensorRT's TopK documents 3,840 at most."""
    random = torch.Generator().manual_seed(0)
    states = torch.randn(1, 1, 4096, 32, generator=random).to(long)
    importance = torch.randint(5, (1, 4096), generator=random).float()
    found = Case(states, states, importance, [4096], [3901], 3901, mode).check(gpu)
    assert found[2][0, -1] == 4095


@pytest.mark.parametrize("best", [1, 698])
def test_long_runs_merge(gpu: torch.device, best: int) -> None:
    """Three slots share hundreds of positions, the longest run last or first."""
    random = torch.Generator().manual_seed(1)
    states = torch.randn(1, 1, 700, 64, generator=random)
    importance = torch.zeros(1, 700)
    importance[0, best] = 1
    found = Case(states, states, importance, [700], [3], 4).check(gpu)
    assert found[2].tolist() == [[0, best, 699, -1]]


@pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning"
)  # the interpreter's, of inf - inf
@pytest.mark.parametrize("mode", ["evict", "merge"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_absorbs_nothing_is_copied_bit_by_bit(
    gpu: torch.device, mode: str, dtype: torch.dtype
) -> None:
    """Even -0, the infinities and NaN of several kinds; what absorbs keeps its own to itself."""
    random = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**15), 2**15, (2, 2, 1, 70, 40), generator=random)
    if dtype == torch.float32:
        numbers = numbers * 2**16 + torch.randint(0, 2**16, numbers.shape, generator=random)
    key, value = numbers.to(torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)
    key[..., 0] = -0.0
    case = Case(key, value, torch.rand(2, 70, generator=random), [70, 60], [70, 60], 70, mode)
    for old, new in zip((key, value), case.check(gpu)[:2], strict=True):
        assert torch.equal(bits(new[0]), bits(old[0]))
        assert torch.equal(bits(new[1, :, :60]), bits(old[1, :, :60]))
        assert (bits(new[1, :, 60:]) == 0).all()
    # Two short of all: two runs of two at most two slots, everything else alone.
    found = replace(case, budgets=[68, 58]).check(gpu)
    for row, length in enumerate(case.lengths):
        index = found[2][row][found[2][row] >= 0].tolist()
        gone = set(range(length)) - set(index)
        near = {j for i in gone for j in (i - 1, i + 1, i - 2, i + 2)}
        for slot, j in enumerate(index):
            if j not in near or mode == "evict":
                assert torch.equal(bits(found[0][row, :, slot]), bits(key[row, :, j]))


@st.composite
def writes(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    entries = draw(st.one_of(st.just(1), st.integers(1, 12)))
    capacity = entries + draw(st.integers(0, 40))
    index = [draw(st.integers(0, capacity - entries)) for _ in range(batch)]
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    width, dtype = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(DTYPES))
    cache = torch.randn(batch, heads, capacity, width, generator=random).to(dtype)
    update = torch.randn(batch, heads, entries, width, generator=random).to(dtype)
    update[..., 0], cache[..., 1] = -0.0, NAN
    return cache, update, index


@settings(max_examples=examples(30), deadline=None)
@given(write=writes())
def test_update_is_the_reference(
    gpu: torch.device, write: tuple[torch.Tensor, torch.Tensor, list[int]]
) -> None:
    cache, update, index = write
    inputs = cache, update, torch.tensor(index)
    (found,) = computed("CacheUpdate", gpu, *inputs)
    assert torch.equal(bits(found), bits(cache_update.OP(*inputs)[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_update_leaves_out_what_does_not_fit(gpu: torch.device, dtype: torch.dtype) -> None:
    cache = torch.zeros(4, 3, 6, 32, dtype=dtype)
    update = torch.arange(1.0, 5)[:, None].expand(4, 3, 4, 32).to(dtype)
    index = torch.tensor([-2, 4, 6, 2**63 - 2])
    with pytest.raises(ParameterError, match="row 0 would write slots -2 to 1 of a cache of 6"):
        cache_update.OP(cache, update, index)
    (found,) = computed("CacheUpdate", gpu, cache, update, index)
    expected = [[3, 4, 0, 0, 0, 0], [0, 0, 0, 0, 1, 2], [0] * 6, [0] * 6]
    for head in range(3):
        assert found[:, head, :, 0].tolist() == expected
    assert torch.equal(found, found[:, :1, :, :1].expand(4, 3, 6, 32))


def test_there_is_no_kernel_for_parity_tests_or_wider_heads(gpu: torch.device) -> None:
    states, one = torch.zeros(1, 1, 4, 160), torch.tensor([4])
    inputs = (states, states, torch.zeros(1, 4), one, one, torch.arange(4))
    with pytest.raises(ParameterError, match="the largest is 128"):
        computed("CacheCompact", gpu, *inputs, mode="merge")
    with pytest.raises(ParameterError, match="unknown mode of the plugin CacheCompact 'merge-ref"):
        computed("CacheCompact", gpu, *inputs, mode="merge-reference")
