"""``CacheCompact`` against loops over rows and positions; what must never change a row."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import onnxruntime
import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from single_node import feeds, session, single_node_model

from lvlm.core.errors import ParameterError
from lvlm.export.ops.cache_compact.contract import MODES, OP
from lvlm.export.ops.op import OpSample

ENGINES = ("torch", "onnx")
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    key: torch.Tensor
    value: torch.Tensor
    importance: torch.Tensor
    length: list[int]
    budget: list[int]
    mode: str
    sinks: int = 1
    recent: int = 1

    def sample(self) -> OpSample:
        length, budget = torch.tensor(self.length), torch.tensor(self.budget)
        slots = torch.arange(max(1, *self.budget))
        tensors = (self.key, self.value, self.importance, length, budget, slots)
        attributes = {"mode": self.mode, "sinks": self.sinks, "recent": self.recent}
        return OpSample("", tensors, attributes)

    def run(self, engine: str) -> list[np.ndarray]:
        sample = self.sample()
        if engine == "torch":
            return [t.numpy() for t in OP(*sample.inputs, **sample.attributes)]
        heads, width = self.key.shape[1], self.key.shape[3]
        runner = compact_session(
            self.mode, self.sinks, self.recent, heads, width, self.value.shape[3], self.key.dtype
        )
        return runner.run(None, feeds(OP, sample))


@functools.cache
def compact_session(
    mode: str, sinks: int, recent: int, heads: int, width: int, value: int, dtype: torch.dtype
) -> onnxruntime.InferenceSession:
    states = [torch.zeros(1, heads, 2, n, dtype=dtype) for n in (width, value)]
    case = Case(states[0], states[1], torch.zeros(1, 2), [2], [2], mode, sinks, recent)
    return session(single_node_model(OP, case.sample()))


def row_by_loops(case: Case, row: int) -> tuple[list[int], dict[int, list[int]]]:
    """What stays of one row; the positions whose mean each survivor becomes."""
    n, budget, sinks = case.length[row], case.budget[row], case.sinks
    score = [s if np.isfinite(s) else 0.0 for s in case.importance[row, :n].tolist()]
    if case.mode == "merge-reference":
        forget = n - 1 - budget
        if forget <= 0:  # nothing, or the released code's branch for a single entry
            return list(range(n))[n - budget :], {}
        middle = range(sinks, n - 1)
        permutation = [j - sinks for j in sorted(middle, key=lambda j: (score[j], j))]
        anchors = [i + sinks for i, p in enumerate(permutation) if p > forget]
        loose = [i for i, p in enumerate(permutation) if p <= forget]
        kept = [*range(sinks), *anchors, n - 1]
    else:
        protected = {j for j in range(n) if j < sinks or j >= n - case.recent}
        ranked = sorted(range(n), key=lambda j: (j not in protected, -score[j], j))
        kept = anchors = sorted(ranked[:budget])
        loose = [j for j in range(n) if j not in kept] if case.mode == "merge" else []
    groups: dict[int, list[int]] = {}
    for j in loose if anchors else []:
        nearest = min(anchors, key=lambda a: (abs(a - j), a))
        groups.setdefault(nearest, [nearest]).append(j)
    return kept, groups


def assert_matches_loops(case: Case, found: list[np.ndarray]) -> None:
    key, value, kept_index, kept = found
    for row, (length, budget) in enumerate(zip(case.length, case.budget, strict=True)):
        stays, groups = row_by_loops(case, row)
        index = kept_index[row, :budget].tolist()
        assert index == stays
        assert index == sorted(set(index))  # in order, none twice
        assert all(0 <= j < length for j in index)  # no padding
        assert (kept_index[row, budget:] == -1).all()
        finite = case.importance[row, :length].isfinite().all()
        assert kept[row] == (budget if finite else -1)
        for old, new in ((case.key, key), (case.value, value)):
            assert not new[row, :, budget:].any()
            states = old[row].numpy()
            for slot, j in enumerate(stays):
                group = groups.get(j, [j])
                # Integers: sums are exact in any order, and one division follows.
                mean = states[:, group].astype(np.float32).sum(1) / np.float32(len(group))
                np.testing.assert_array_equal(new[row, :, slot], mean.astype(new.dtype))


@st.composite
def cases(draw: st.DrawFn, modes: tuple[str, ...] = MODES) -> Case:
    """Padding holds NaN; a short extent, or one of several blocks of the merging product."""
    mode = draw(st.sampled_from(modes))
    sinks = draw(st.sampled_from([0, 1, 4]))
    recent = draw(st.sampled_from([0, 1, 2])) if mode != "merge-reference" else 1
    batch, extent = draw(st.integers(1, 3)), draw(st.one_of(st.integers(1, 12), st.just(101)))
    length = [draw(st.integers(1, extent)) for _ in range(batch)]
    budget = []
    for n in length:
        least = max(1, min(n, sinks + recent))
        few = st.integers(least, min(n, least + 2))  # long runs between anchors
        choices = [st.integers(least, n), few, st.just(n)]
        if mode == "merge-reference" and n > 1:
            choices.append(st.just(n - 1))
        budget.append(draw(st.one_of(choices)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    width = draw(st.sampled_from([32, 64, 80, 96, 128]))
    heads = draw(st.sampled_from([1, 3]))
    shape = (batch, heads, extent, width)
    key, value = torch.randint(-8, 9, (2, *shape), generator=random).float()
    grades = draw(st.sampled_from([1, 3, 1000]))  # 1: all tie
    importance = torch.randint(0, grades, (batch, extent), generator=random).float()
    if draw(st.booleans()):
        importance[0, length[0] // 2] = draw(st.sampled_from([NAN, float("inf")]))
    padding = torch.arange(extent) >= torch.tensor(length)[:, None]
    importance[padding] = NAN
    key, value = (t.masked_fill(padding[:, None, :, None], NAN) for t in (key, value))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    return Case(key.to(dtype), value.to(dtype), importance, length, budget, mode, sinks, recent)


@settings(max_examples=examples(250), deadline=None)
@given(cases())
def test_matches_loops(case: Case) -> None:
    for engine in ENGINES:
        assert_matches_loops(case, case.run(engine))


@settings(max_examples=examples(60), deadline=None)
@given(cases(), st.integers(0, 40))
def test_padding_and_other_rows_change_nothing(case: Case, more: int) -> None:
    alone = replace(
        case,
        key=case.key[:1],
        value=case.value[:1],
        importance=case.importance[:1],
        length=case.length[:1],
        budget=case.budget[:1],
    )
    pad = functools.partial(torch.nn.functional.pad, value=NAN)
    longer = replace(
        case,
        key=pad(case.key, (0, 0, 0, more)),
        value=pad(case.value, (0, 0, 0, more)),
        importance=pad(case.importance, (0, more)),
    )
    n = case.budget[0]
    for engine in ENGINES:
        key, value, index, kept = longer.run(engine)
        expected = alone.run(engine)
        np.testing.assert_array_equal(key[:1, :, :n], expected[0])
        np.testing.assert_array_equal(value[:1, :, :n], expected[1])
        np.testing.assert_array_equal(index[:1, :n], expected[2])
        np.testing.assert_array_equal(kept[:1], expected[3])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_full_budget_copies_every_bit(engine: str, mode: str, dtype: torch.dtype) -> None:
    """Even -0, the infinities and NaN of several kinds."""
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (2, 2, 3, 70, 32), generator=random)
    if dtype == torch.float32:
        bits = bits * 2**16 + torch.randint(0, 2**16, bits.shape, generator=random)
    key, value = bits.to(torch.int16 if dtype == torch.float16 else torch.int32).view(dtype)
    key[..., 0] = -0.0
    key[1, :, 60:] = 0
    case = Case(key, value, torch.rand(2, 70), [70, 60], [70, 60], mode)
    found = case.run(engine)
    integer = np.int16 if dtype == torch.float16 else np.int32
    for old, new in ((key, found[0]), (value, found[1])):
        old[1, :, 60:] = 0
        np.testing.assert_array_equal(new.view(integer), old.numpy().view(integer))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_absorbs_nothing_is_copied_and_means_are_fp32(engine: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(3)
    key, value = torch.randn(2, 1, 2, 150, 64, generator=random).to(dtype)
    case = Case(key, value, torch.rand(1, 150, generator=random), [150], [70], "merge")
    stays, groups = row_by_loops(case, 0)
    assert 10 < len(groups) < 60
    found = case.run(engine)
    limit = 1e-6 if dtype == torch.float32 else 1e-3
    for old, new in ((key, found[0]), (value, found[1])):
        states = old[0].numpy()
        for slot, j in enumerate(stays):
            if j not in groups:
                np.testing.assert_array_equal(new[0, :, slot], states[:, j])
                continue
            mean = states[:, groups[j]].astype(np.float64).mean(1)
            np.testing.assert_allclose(new[0, :, slot], mean, rtol=limit, atol=limit / 4)


def test_value_heads_may_be_of_another_size() -> None:
    random = torch.Generator().manual_seed(0)
    key = torch.randint(-8, 9, (1, 2, 12, 96), generator=random).float()
    value = torch.randint(-8, 9, (1, 2, 12, 64), generator=random).float()
    for mode in MODES:
        case = Case(key, value, torch.rand(1, 12, generator=random), [11], [5], mode)
        for engine in ENGINES:
            assert_matches_loops(case, case.run(engine))


def test_bf16_reference() -> None:
    random = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, 2, 9, 32, generator=random).bfloat16()
    case = Case(key, value, torch.rand(1, 9, generator=random), [9], [4], "merge")
    sample = case.sample()
    found = OP(*sample.inputs, **sample.attributes)
    wide = replace(case, key=key.float(), value=value.float()).run("torch")
    for have, want in zip(found[:2], wide[:2], strict=True):
        assert torch.equal(have, torch.from_numpy(want).bfloat16())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tie_goes_left(engine: str) -> None:
    states = torch.arange(7.0).view(1, 1, 7, 1).expand(1, 2, 7, 32).contiguous()
    importance = torch.tensor([[0.0, 0, 0, 5, 0, 0, 0]])
    found = Case(states, states, importance, [7], [3], "merge").run(engine)
    assert found[2].tolist() == [[0, 3, 6]]
    # 1 and 4 are nearer to the left, 2 and 5 to the right; nothing lies halfway
    assert found[0][0, 0, :, 0].tolist() == [0.5, 3.0, 5.5]
    wide = Case(states, states, importance * 0, [7], [2], "merge").run(engine)
    assert wide[0][0, 1, :, 0].tolist() == [1.5, 5.0]  # 3 lies halfway


@pytest.mark.parametrize("engine", ENGINES)
def test_the_released_code_drops_the_first_entry_when_one_is_too_many(engine: str) -> None:
    states = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 2, 5, 32).contiguous()
    case = Case(states, states, torch.rand(1, 5), [5], [4], "merge-reference")
    found = case.run(engine)
    assert found[2].tolist() == [[1, 2, 3, 4]]
    np.testing.assert_array_equal(found[0], states[:, :, 1:].numpy())


def test_what_does_not_fit_is_refused() -> None:
    states, importance = torch.zeros(1, 1, 6, 4), torch.zeros(1, 6)
    case = Case(states, states, importance, [6], [4], "evict")

    def refused(match: str, **changes: object) -> None:
        with pytest.raises(ParameterError, match=match):
            replace(case, **changes).run("torch")

    refused("unknown compaction mode 'merg'; did you mean merge", mode="merg")
    refused("budget <= length <= N", budget=[7])
    refused("budget <= length <= N", length=[7])
    refused("a budget of 1 has no room for 1 first and 1 last", budget=[1])
    refused("a budget of 4 has no room for 4 first and 1 last", sinks=4)
    refused("a budget of 2 has no room for 2 first", sinks=2, budget=[2], mode="merge-reference")
    refused("sinks is -1", sinks=-1)
    refused("merge-reference protects 1 recent", recent=2, mode="merge-reference")
    refused(r"importance has shape \(6,\)", importance=importance[0])
    given = case.sample().inputs
    with pytest.raises(ParameterError, match="slots has 3 entries; the largest budget is 4"):
        OP(*given[:5], torch.arange(3))
    with pytest.raises(ParameterError, match="slots has 7 entries"):
        OP(*given[:5], torch.arange(7))
    assert replace(case, budget=[5], sinks=6, mode="merge-reference").run("torch")[3] == [5]
