"""``TokenMerge`` against loops over rows, images and tokens; what must never change a row."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from single_node import assert_close, feeds, session, single_node_model

from lvlm.core.errors import ParameterError
from lvlm.export.ops.op import OpSample
from lvlm.export.ops.token_merge.contract import OP, RULES, WITH_CENTRES
from lvlm.export.ops.token_merge.samples import inputs


@dataclass(frozen=True)
class Case:
    hidden: torch.Tensor
    importance: torch.Tensor
    image_id: torch.Tensor
    positions: torch.Tensor
    keep: list[list[int]]
    recycle: list[list[int]]
    rule: str
    absorb: int

    def sample(self) -> OpSample:
        counts = self.recycle if self.rule in WITH_CENTRES else None
        tensors = inputs(
            self.hidden, self.importance, self.image_id, self.positions, self.keep, counts
        )
        return OpSample("case", tensors, {"merge": self.rule, "absorb": self.absorb})

    def run(self) -> list[np.ndarray]:
        sample = self.sample()
        return [t.numpy() for t in OP(*sample.inputs, **sample.attributes)]


def cosine(a: np.ndarray, b: np.ndarray) -> np.float32:
    """In fp32 and in the documented order of operations, so that ties are the same ties."""
    least = np.float32(1e-12)
    return np.float32(a @ b) / max(np.sqrt(a @ a), least) / max(np.sqrt(b @ b), least)


def row_by_loops(case: Case, row: int) -> tuple[list[tuple[int, np.ndarray]], list[int]]:
    """One row: (old index, hidden state) of what survives in order; the map."""
    hidden = case.hidden[row].float().numpy()
    weight, ids = case.importance[row].numpy(), case.image_id[row].tolist()
    last = max((j for j, image in enumerate(ids) if image >= 0), default=-1)
    survivors = {j: hidden[j] for j, image in enumerate(ids) if image == 0}
    goes_to: dict[int, int] = {}
    for image, keep in enumerate(case.keep[row], start=1):
        ranked = [j for j, which in enumerate(ids) if which == image]
        ranked.sort(key=lambda j: (j != last, -weight[j], j))
        survivors |= {j: hidden[j] for j in ranked[:keep]}
        centres = {
            "recycle": ranked[keep - case.recycle[row][image - 1] : keep],
            "illava": ranked[keep - case.recycle[row][image - 1] : keep],
            "nearest": ranked[:keep],
            "drop": [],
        }[case.rule]
        if case.rule == "illava":
            share(hidden, centres, sorted(ranked[keep:]), case.absorb, survivors, goes_to)
            continue
        owned: dict[int, list[tuple[float, int]]] = {c: [] for c in centres}
        for j in ranked[keep:] if centres else []:
            similar = [cosine(hidden[c], hidden[j]) for c in centres]
            best = similar.index(max(similar))
            owned[centres[best]].append((-similar[best], j))
        for centre, tokens in owned.items():
            tokens.sort()
            limit = case.absorb if case.rule == "recycle" else len(tokens)
            group = [centre, *(j for _, j in tokens[:limit])]
            goes_to |= dict.fromkeys(group[1:], centre)
            shares = [float(weight[j]) for j in group]
            if sum(shares) == 0:
                shares = [1.0] * len(group)
            if len(group) > 1:
                survivors[centre] = np.average(hidden[group], axis=0, weights=shares)
    order = sorted(survivors)
    new = {j: order.index(goes_to.get(j, j)) for j in {*survivors, *goes_to}}
    return [(j, survivors[j]) for j in order], [new.get(j, -1) for j in range(len(ids))]


def share(
    hidden: np.ndarray,
    centres: list[int],
    loose: list[int],
    absorb: int,
    survivors: dict[int, np.ndarray],
    goes_to: dict[int, int],
) -> None:
    """illava: every centre takes its own nearest, half and half with itself."""
    likest: dict[int, float] = {}
    for centre in centres:
        products = {j: float(hidden[centre] @ hidden[j]) for j in loose}
        taken = sorted(loose, key=lambda j: (-products[j], j))[:absorb]
        if not taken:
            continue
        weights = [
            np.exp((products[j] - products[taken[0]]) / hidden.shape[1] ** 0.5) for j in taken
        ]
        mean = np.average(hidden[taken], axis=0, weights=weights)
        survivors[centre] = (hidden[centre] + mean) / 2
        for j in taken:
            if j not in likest or products[j] > likest[j]:
                likest[j], goes_to[j] = products[j], centre


def assert_matches_loops(case: Case, got: list[np.ndarray]) -> None:
    merged, positions, image_id, mapping = got
    limit = 2e-6 if case.hidden.dtype == torch.float32 else 2e-3
    for row in range(len(case.image_id)):
        survivors, expected_map = row_by_loops(case, row)
        assert mapping[row].tolist() == expected_map
        old = [j for j, _ in survivors]
        n = len(old)
        assert image_id[row, :n].tolist() == case.image_id[row, old].tolist()
        np.testing.assert_array_equal(positions[..., row, :n], case.positions[..., row, old])
        assert (image_id[row, n:] == -1).all()
        assert not merged[row, n:].any()
        assert not positions[..., row, n:].any()
        for slot, (j, state) in enumerate(survivors):
            if state.base is not None:  # a view of ``hidden``: nothing was absorbed
                np.testing.assert_array_equal(merged[row, slot], case.hidden[row, j].numpy())
            np.testing.assert_allclose(merged[row, slot], state, rtol=limit, atol=limit)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, images = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    ids, keep, recycle = [], [], []
    for _ in range(batch):
        row = [0] * draw(st.integers(0, 3))
        for image in range(1, images + 1):
            row += [image] * draw(st.integers(0, 9)) + [0] * draw(st.integers(0, 2))
        row = row or [0]
        keep.append([draw(st.integers(0, row.count(m))) for m in range(1, images + 1)])
        recycle.append([draw(st.integers(0, k)) for k in keep[-1]])
        ids.append([-1] * draw(st.integers(0, 2)) + row)
    length = max(len(row) for row in ids) + draw(st.integers(0, 1))
    image_id = torch.tensor([row + [-1] * (length - len(row)) for row in ids])
    keep[0][0] = max(keep[0][0], min(1, ids[0].count(1)))
    # Integers: products are exact, so equal similarities are equal in every implementation.
    random = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    most = draw(st.sampled_from([1, 3]))  # 1: many equal similarities, and zero vectors
    hidden = torch.randint(-most, most + 1, (*image_id.shape, 3), generator=random).float()
    hidden[image_id < 0] = float("nan")
    grades = draw(st.sampled_from([1, 3, 1000]))
    importance = torch.randint(0, grades, image_id.shape, generator=random) / grades
    rank = draw(st.sampled_from([(), (3,)]))
    positions = torch.randint(0, 50, (*rank, *image_id.shape), generator=random)
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    rule = draw(st.sampled_from(RULES))
    absorb = draw(st.sampled_from([1, 3])) if rule in WITH_CENTRES else 5
    return Case(hidden.to(dtype), importance, image_id, positions, keep, recycle, rule, absorb)


@functools.cache
def case_session(
    rule: str, absorb: int, dtype: torch.dtype, rank: int, kernels: Path | None = None
) -> onnxruntime.InferenceSession:
    one = torch.ones(1, 4, dtype=torch.int64)
    positions = one.expand(3, 1, 4) if rank == 3 else one
    hidden = torch.zeros(1, 4, 3, dtype=dtype)
    case = Case(hidden, one.float(), one, positions, [[2]], [[1]], rule, absorb)
    return session(single_node_model(OP, case.sample()), kernels)


@settings(max_examples=examples(200), deadline=None)
@given(cases())
def test_reference_matches_loops(case: Case) -> None:
    assert_matches_loops(case, case.run())


@settings(max_examples=examples(200), deadline=None)
@given(cases())
def test_onnx_function_matches_loops(case: Case) -> None:
    runner = case_session(case.rule, case.absorb, case.hidden.dtype, case.positions.dim())
    assert_matches_loops(case, runner.run(None, feeds(OP, case.sample())))


@settings(max_examples=examples(200), deadline=None)
@given(case=cases())
def test_kernel_matches_loops(kernels: Path, case: Case) -> None:
    shape = case.hidden.dtype, case.positions.dim()
    runner = case_session(case.rule, case.absorb, *shape, kernels)
    assert_matches_loops(case, runner.run(None, feeds(OP, case.sample())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_kernel_of_many_tokens_whatever_the_threads(
    rule: str, dtype: torch.dtype, kernels: Path
) -> None:
    """Many tasks, more centres than a panel has, a width that vectors do not divide."""
    image_id = torch.tensor([[0] * 5 + [1] * 400 + [0] * 9 + [2] * 290, [1] * 210 + [0] * 494])
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 704, 43, generator=random).to(dtype)
    importance, positions = torch.rand(2, 704, generator=random), torch.arange(704).expand(2, -1)
    counts = [[90, 33], [70, 0]], [[70, 3], [40, 0]]
    sample = Case(hidden, importance, image_id, positions, *counts, rule, 5).sample()
    one, three = (
        session(single_node_model(OP, sample), kernels, threads).run(None, feeds(OP, sample))
        for threads in (1, 3)
    )
    assert_close(OP, sample, one)
    for a, b in zip(one, three, strict=True):
        np.testing.assert_array_equal(a, b)


def test_kernel_refuses_what_does_not_fit(kernels: Path) -> None:
    ids = torch.tensor([[0, 1, 1, 1]])
    case = Case(torch.ones(1, 4, 2), torch.ones(1, 4), ids, ids, [[2]], [[1]], "recycle", 5)
    runner = session(single_node_model(OP, case.sample()), kernels)
    given = feeds(OP, case.sample())
    for name, value, said in (
        ("keep", [[4]], "keep exceeds the image tokens"),
        ("recycle", [[3]], "recycle exceeds keep"),
        ("out_slots", [0, 1], "out_slots are fewer"),
        ("importance", [[1.0]], "do not fit"),
    ):
        wrong = np.array(value, given[name].dtype)
        with pytest.raises(Exception, match=f"lvlm::TokenMerge: .*{said}"):
            runner.run(None, {**given, name: wrong})


@settings(max_examples=examples(100), deadline=None)
@given(cases(), st.integers(0, 2), st.integers(0, 2))
def test_padding_and_other_rows_change_nothing(case: Case, left: int, right: int) -> None:
    alone = Case(
        case.hidden[:1],
        case.importance[:1],
        case.image_id[:1],
        case.positions[..., :1, :],
        case.keep[:1],
        case.recycle[:1],
        case.rule,
        case.absorb,
    )
    pad = functools.partial(torch.nn.functional.pad, pad=(left, right))
    padded = replace(
        case,
        hidden=torch.nn.functional.pad(case.hidden, (0, 0, left, right), value=float("nan")),
        importance=pad(case.importance, value=float("nan")),
        image_id=pad(case.image_id, value=-1),
        positions=pad(case.positions, value=7),
    )
    merged, positions, image_id, mapping = alone.run()
    length = image_id.shape[1]
    found = padded.run()
    np.testing.assert_array_equal(found[0][:1, :length], merged)
    np.testing.assert_array_equal(found[1][..., :1, :length], positions)
    np.testing.assert_array_equal(found[2][:1, :length], image_id)
    np.testing.assert_array_equal(found[3][:1, left : left + mapping.shape[1]], mapping)
    assert (found[2][0, length:] == -1).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keeping_everything_copies_every_bit(rule: str, dtype: torch.dtype) -> None:
    image_id = torch.tensor([[0, 1, 1, 1, 1, 0]])
    hidden = torch.randn(1, 6, 16).to(dtype)
    positions = torch.arange(6)[None]
    case = Case(hidden, torch.rand(1, 6), image_id, positions, [[4]], [[2]], rule, 5)
    sample = case.sample()
    merged, _, ids, mapping = OP(*sample.inputs, **sample.attributes)
    assert torch.equal(merged, hidden)
    assert torch.equal(ids, image_id)
    assert torch.equal(mapping, positions)


def test_a_last_token_of_an_image_stays() -> None:
    image_id = torch.tensor([[0, 1, 1, 1, -1]])
    importance = torch.tensor([[0.1, 0.5, 0.4, 0.0, 0.9]])
    hidden = torch.randn(1, 5, 4)
    case = Case(hidden, importance, image_id, torch.arange(5)[None], [[2]], [[1]], "drop", 5)
    assert case.run()[3].tolist() == [[0, 1, -1, 2, -1]]
    merged, _, _, mapping = replace(case, rule="recycle").run()
    assert mapping.tolist() == [[0, 1, 1, 2, -1]]  # token 1 is the centre, the last is untouched
    np.testing.assert_array_equal(merged[0, 2], hidden[0, 3].numpy())


def equal_centres() -> tuple[Case, list[int]]:
    """Everything is equally similar: the more important centre, and the lower index."""
    importance = torch.tensor([[0.8, 0.1, 0.9, 0.2, 0.3, 0.4, 0.0]])
    image_id = torch.tensor([[1] * 6 + [0]])
    hidden = torch.ones(1, 7, 3)
    case = Case(hidden, importance, image_id, image_id, [[2]], [[2]], "recycle", 3)
    return case, [0, 1, 1, 1, 1, -1, 2]


def equal_tokens(rule: str) -> tuple[Case, list[int]]:
    """Two tokens are equally similar, then one is more so: of the two the lower index."""
    axes = torch.eye(3)
    hidden = torch.stack([axes[0], axes[1], axes[1], axes[0], axes[2]])[None]
    importance = torch.tensor([[0.9, 0.1, 0.1, 0.1, 0.0]])
    image_id = torch.tensor([[1, 1, 1, 1, 0]])
    case = Case(hidden, importance, image_id, image_id, [[1]], [[1]], rule, 2)
    return case, [0, 0, -1, 0, 1]


TIES = pytest.mark.parametrize(
    ("case", "expected"), [equal_centres(), equal_tokens("recycle"), equal_tokens("illava")]
)


@TIES
def test_equally_similar(case: Case, expected: list[int]) -> None:
    runner = case_session(case.rule, case.absorb, torch.float32, 2)
    for found in (case.run(), runner.run(None, feeds(OP, case.sample()))):
        assert found[3].tolist() == [expected]


@TIES
def test_kernel_of_equally_similar(case: Case, expected: list[int], kernels: Path) -> None:
    runner = case_session(case.rule, case.absorb, torch.float32, 2, kernels)
    assert runner.run(None, feeds(OP, case.sample()))[3].tolist() == [expected]


def test_what_does_not_fit_is_refused() -> None:
    ids = torch.tensor([[0, 1, 1, 1]])
    case = Case(torch.ones(1, 4, 2), torch.ones(1, 4), ids, ids, [[2]], [[1]], "recycle", 5)
    given = case.sample().inputs
    with pytest.raises(ParameterError, match="unknown merge rule 'nearst'; did you mean nearest"):
        OP(*given, merge="nearst")
    with pytest.raises(ParameterError, match="illava alone take"):
        OP(*given, merge="drop")
    with pytest.raises(ParameterError, match="illava alone take"):
        OP(*given[:7], merge="recycle")
    with pytest.raises(ParameterError, match="absorb is 0"):
        OP(*given, absorb=0)
    with pytest.raises(ParameterError, match="keep exceeds"):
        replace(case, keep=[[4]]).run()
    with pytest.raises(ParameterError, match="recycle exceeds"):
        replace(case, recycle=[[3]]).run()
    with pytest.raises(ParameterError, match=r"keep_slots has shape \(1, 1\)"):
        OP(*given[:5], given[4], *given[6:])
    with pytest.raises(ParameterError, match="out_slots has 2 slots of 3"):
        OP(*given[:6], torch.arange(2), *given[7:])
