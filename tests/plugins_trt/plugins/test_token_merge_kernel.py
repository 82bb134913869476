"""TokenMerge's kernels against its reference: layouts, ties and lengths that the samples lack.

Integers have exact products, so equal similarities are equal in every implementation. With
any other hidden states, cases in which a rounding could decide are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from example_counts import examples, whole
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lvlm.export.ops.op import OpSample
from lvlm.export.ops.token_merge.contract import OP, RULES, WITH_CENTRES
from lvlm.export.ops.token_merge.function import EPSILON
from lvlm.export.ops.token_merge.samples import inputs
from lvlm.plugins_trt.plugins.plan_runner import run
from lvlm.plugins_trt.plugins.registry import plugins
from lvlm.plugins_trt.token_merge.absorb import MIN_NORM

PLUGIN = plugins()["TokenMerge"]
NEAR_TIE = 1e-6


@dataclass(frozen=True)
class Layout:
    image_id: torch.Tensor  # [B, N]
    keep: list[list[int]]  # [B][M]
    recycle: list[list[int]]

    def sample(
        self,
        hidden: torch.Tensor,
        importance: torch.Tensor,
        positions: torch.Tensor,
        rule: str,
        absorb: int = 5,
        spare: int = 0,
    ) -> OpSample:
        """``spare``: how many more slots there are than anything needs."""
        counts = self.recycle if rule in WITH_CENTRES else None
        tensors = list(inputs(hidden, importance, self.image_id, positions, self.keep, counts))
        for at in (5, 6, 8):
            slots = tensors[at]
            if slots is not None:
                tensors[at] = torch.arange(len(slots) + spare)
        return OpSample("case", tensors, {"merge": rule, "absorb": absorb})


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Up to three images in rows of different length; none, one, some or all of their tokens
    stay."""
    batch, images = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rows, keep, recycle = [], [], []
    for _ in range(batch):
        row = [0] * draw(st.integers(0, 3))
        for image in range(1, images + 1):
            size = draw(st.sampled_from([0, 1, 7, 20, 70]))
            row += [image] * size + [0] * draw(st.integers(0, 2))
        row = row or [0]
        sizes = [row.count(image) for image in range(1, images + 1)]
        keep.append([draw(st.sampled_from([0, min(1, n), n // 3, n // 2, n])) for n in sizes])
        recycle.append([draw(st.sampled_from([0, k // 10, k // 2, k])) for k in keep[-1]])
        rows.append([-1] * draw(st.integers(0, 2)) + row)
    length = max(map(len, rows)) + draw(st.integers(0, 1))
    image_id = torch.tensor([row + [-1] * (length - len(row)) for row in rows])
    return Layout(image_id, keep, recycle)


@st.composite
def cases(draw: st.DrawFn, rule: str) -> OpSample:
    layout = draw(layouts())
    random = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    shape = *layout.image_id.shape, draw(st.sampled_from([3, 48, 80, 200]))
    most = draw(st.sampled_from([0, 1, 3]))  # 1: many equal similarities, and zero vectors
    if most:
        hidden = torch.randint(-most, most + 1, shape, generator=random).to(dtype)
    else:
        hidden = torch.randn(shape, generator=random).to(dtype)
    grades = draw(st.sampled_from([1, 3, 1000]))
    importance = torch.randint(0, grades, shape[:2], generator=random) / grades
    padding = layout.image_id < 0  # never looked at
    hidden[padding], importance[padding] = float("nan"), float("nan")
    leads = draw(st.sampled_from([(), (3,)]))
    positions = torch.randint(0, 50, (*leads, *shape[:2]), generator=random)
    absorb = draw(st.sampled_from([1, 3, 11]))
    sample = layout.sample(hidden, importance, positions, rule, absorb, draw(st.integers(0, 2)))
    assume(most or rule == "drop" or not near_tie(sample, layout))
    return sample


def near_tie(sample: OpSample, layout: Layout) -> bool:
    """Whether for some token two centres, or for some centre two tokens, are as good as equally
    similar. A pair's similarity is found only where both are in one image."""
    hidden, importance = sample.inputs[0], sample.inputs[1]
    assert hidden is not None
    assert importance is not None
    for row, ids in enumerate(layout.image_id):
        last = (ids >= 0).nonzero().flatten()[-1:]
        score = importance[row].index_fill(0, last, float("inf"))
        unit = hidden[row].double()
        if sample.attributes["merge"] != "illava":
            unit = torch.nn.functional.normalize(unit, dim=1)
        for image, k in enumerate(layout.keep[row]):
            tokens = (ids == image + 1).nonzero().flatten()
            ranked = tokens[score[tokens].argsort(descending=True, stable=True)]
            first = 0 if sample.inputs[7] is None else k - layout.recycle[row][image]
            cosine = unit[ranked[first:k]] @ unit[ranked[k:]].T
            for axis in (0, 1):
                gaps = cosine.sort(dim=axis).values.diff(dim=axis)
                if (gaps < NEAR_TIE).any():
                    return True
    return False


def check(sample: OpSample, device: torch.device) -> None:
    """Indices exactly, hidden states within the tolerance, and every bit of what is alone."""
    hidden = sample.inputs[0]
    assert hidden is not None
    expected = OP.reference(*sample.inputs, **sample.attributes)
    given = [None if tensor is None else tensor.to(device) for tensor in sample.inputs]
    merged, *indices = (tensor.cpu() for tensor in run(PLUGIN, given, sample.attributes))
    for name, right, got in zip(("positions", "id", "map"), expected[1:], indices, strict=True):
        assert torch.equal(got, right), name
    largest = max(1.0, float(expected[0].abs().max()))
    error = (merged.double() - expected[0].double()).abs().max()
    assert error <= OP.tolerance[hidden.dtype] * largest
    for row, new in enumerate(expected[3]):
        slots, count = new[new >= 0].unique(return_counts=True)
        alone = slots[count == 1]
        if sample.attributes["merge"] == "illava":  # what a centre took may map to another one
            copied = hidden[row, (new[None] == alone[:, None]).int().argmax(1)]
            alone = alone[(bits(copied) == bits(expected[0][row, alone])).all(1)]
        padding = torch.ones(merged.shape[1], dtype=torch.bool).index_fill(0, slots, False)
        same = torch.cat((alone, padding.nonzero().flatten()))
        assert torch.equal(bits(merged[row, same]), bits(expected[0][row, same]))


def bits(data: torch.Tensor) -> torch.Tensor:
    return data.view(torch.int32 if data.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=examples(15), deadline=None)
@given(data=st.data())
def test_kernels_equal_the_reference(rule: str, gpu: torch.device, data: st.DataObject) -> None:
    check(data.draw(cases(rule)), gpu)


LONG = [("recycle", 4096, 3900, 300), ("nearest", 500, 280, 280), ("illava", 900, 500, 40)]


@pytest.mark.parametrize(("rule", "length", "keep", "centres"), LONG if whole() else LONG[:2])
def test_long_rows(rule: str, length: int, keep: int, centres: int, gpu: torch.device) -> None:
    """More than TensorRT's TopK can keep (3,840); centres by the block; few values of importance,
    so that ties cross blocks too."""
    random = torch.Generator().manual_seed(7)
    image_id = torch.ones(1, length, dtype=torch.int64)
    image_id[0, :30] = 0
    hidden = torch.randint(-2, 3, (1, length, 8), generator=random).float()
    importance = torch.randint(0, 3, (1, length), generator=random) / 4
    positions = torch.arange(length).expand(1, length)
    layout = Layout(image_id, [[keep]], [[centres]])
    check(layout.sample(hidden, importance, positions, rule), gpu)


@pytest.mark.parametrize("rule", ["recycle", "nearest"])
def test_one_centre_takes_many(rule: str, gpu: torch.device) -> None:
    """More than a block of equal tokens: the lower indices first, and no more than ``absorb``."""
    image_id = torch.tensor([[0] + [1] * 150 + [0]])
    hidden = torch.ones(1, 152, 16)
    importance = torch.linspace(1, 0, 152)[None]
    layout = Layout(image_id, [[4]], [[2]])
    sample = layout.sample(hidden, importance, image_id, rule, absorb=130)
    check(sample, gpu)
    mapping = run(PLUGIN, [t if t is None else t.to(gpu) for t in sample.inputs],
                  sample.attributes)[3]  # fmt: skip
    absorbed = int((mapping == (3 if rule == "recycle" else 1)).sum()) - 1
    assert absorbed == (130 if rule == "recycle" else 146)


def test_two_runs_give_the_same_bits(gpu: torch.device) -> None:
    random = torch.Generator().manual_seed(1)
    image_id = torch.ones(2, 90, dtype=torch.int64)
    hidden = torch.randn(2, 90, 48, generator=random)
    importance = torch.rand(2, 90, generator=random)
    sample = Layout(image_id, [[30], [50]], [[10], [20]]).sample(
        hidden, importance, image_id, "recycle"
    )
    given = [None if tensor is None else tensor.to(gpu) for tensor in sample.inputs]
    first, second = (run(PLUGIN, given, sample.attributes) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_counts_that_do_not_fit_do_no_harm(rule: str, gpu: torch.device) -> None:
    """The host promises fitting counts; where it errs, every output is written and in range."""
    image_id = torch.tensor([[0, 1, 1, 2, 3, -1]])  # an image 3 that ``keep`` does not have
    layout = Layout(image_id, [[1, 1]], [[1, 1]])
    sample = layout.sample(torch.rand(1, 6, 8), torch.rand(1, 6), image_id, rule)
    given = [None if tensor is None else tensor.to(gpu) for tensor in sample.inputs]
    for wrong in (-5, 9):
        given[4] = torch.tensor([[wrong, wrong]], device=gpu)
        if rule in WITH_CENTRES:
            given[7] = torch.tensor([[wrong, 1]], device=gpu)
        merged, _, _, mapping = run(PLUGIN, given, sample.attributes)
        assert merged.isfinite().all()
        assert ((mapping >= -1) & (mapping < image_id.shape[1])).all()


def test_the_least_norm_is_the_contracts() -> None:
    assert MIN_NORM.value == EPSILON
