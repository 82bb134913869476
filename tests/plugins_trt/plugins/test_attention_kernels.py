"""The kernels of ``CacheAttention`` on generated inputs, against the op's torch reference."""

from __future__ import annotations

import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from scratch import scratch_bytes

from lvlm.core.errors import ParameterError
from lvlm.export.ops import cache_importance, scored_attention
from lvlm.export.ops.cache_attention import HEAD_MULTIPLE, LARGEST_HEAD, OP
from lvlm.plugins_trt.cache_attention.plugin import FEW, MANY, SPLIT, SPLITS, splits_of
from lvlm.plugins_trt.plugins.plan_runner import run
from lvlm.plugins_trt.plugins.plugin_plan import PluginStep
from lvlm.plugins_trt.plugins.registry import plugins

NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [32, 64, 72, 80, 96, 128]
PLUGIN, SCORED = plugins()["CacheAttention"], plugins()["ScoredAttention"]
Inputs = tuple[torch.Tensor, ...]


def check(inputs: Inputs, device: torch.device, window: int = 0) -> torch.Tensor:
    """The kernels' output, which must be the reference's."""
    attributes = {"scale": inputs[0].shape[3] ** -0.5, "window": window}
    (expected,) = OP(*inputs, **attributes)
    (found,) = run(PLUGIN, [tensor.to(device) for tensor in inputs], attributes)
    found = found.cpu()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.isfinite().all()
    right = expected.double()
    largest = max(1.0, float(right.abs().max()) if right.numel() else 0)
    error = (found.double() - right).abs()
    assert not error.numel() or float(error.max()) <= OP.tolerance[expected.dtype] * largest
    return found


def states(
    seen: list[int],
    key_heads: int,
    group: int,
    rows: int,
    positions: int,
    width: int,
    seed: int = 0,
) -> Inputs:
    """In fp32; keys and values that no row sees are NaN."""
    random = torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(len(seen), key_heads * group, rows, width, generator=random)
    key, value = torch.randn(2, len(seen), key_heads, positions, width, generator=random)
    counts = torch.tensor(seen)
    unused = torch.arange(positions) >= (counts + rows - 1)[:, None]
    key, value = (t.masked_fill(unused[:, None, :, None], NAN) for t in (key, value))
    return query, key, value, counts


def typed(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return *(tensor.to(dtype) for tensor in inputs[:3]), inputs[3]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Inputs, int]:
    """Sizes about those of tiles, 16 and 64 rows and 64 keys, and of splits, 128 keys."""
    batch, key_heads, group = draw(st.sampled_from([(3, 1, 1), (2, 1, 7), (1, 2, 3), (2, 2, 1)]))
    rows = draw(st.just(1) | st.integers(2, 6) | st.integers(62, 66))
    more = draw(st.integers(0, 10) | st.integers(60, 70) | st.integers(250, 260))
    seen = [draw(st.sampled_from([0, 1, more, more + 1])) for _ in range(batch)]
    width, seed = draw(st.sampled_from(WIDTHS)), draw(st.integers(0, 1000))
    inputs = states(seen, key_heads, group, rows, rows + more, width, seed)
    window = draw(st.sampled_from([0, 0, 0, 1, 30, 200]))
    return typed(inputs, draw(st.sampled_from(DTYPES))), window


@settings(max_examples=examples(8), deadline=None)
@given(case=cases())
def test_attention_is_the_reference(case: tuple[Inputs, int], gpu: torch.device) -> None:
    inputs, window = case
    check(inputs, gpu, window)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"long", "valid"} <= set(metafunc.fixturenames):
        whole = metafunc.config.getoption("--whole")
        every = [(dtype, n) for dtype in DTYPES for n in (1, 128, 129, 2047, 2048)]
        metafunc.parametrize(("long", "valid"), every if whole else [(torch.float16, 700)])


def test_a_long_cache(gpu: torch.device, long: torch.dtype, valid: int) -> None:
    """Keys are shared out over what is valid, in a row by itself."""
    inputs = typed(states([valid, 1, min(valid, 65)], 1, 4, 1, 2048, 64), long)
    shapes = {name: tuple(t.shape) for name, t in zip(["query", "key", "value", "seen"], inputs,
                                                      strict=True)}  # fmt: skip
    assert SPLIT(shapes) == 16  # of 128 keys where all are valid
    found = check(inputs, gpu)
    one = [t[:1] for t in inputs]
    assert torch.equal(check(tuple(one), gpu)[0], found[0])  # same bits beside other rows


def test_rows_that_see_nothing_are_zero(gpu: torch.device) -> None:
    for positions in (9, 300):  # in one part, and in several
        found = check(states([0, 2], 1, 2, 2, positions, 32), gpu)
        assert not found[0, :, 0].any()
        assert found[0, :, 1].any()
        assert found[1].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of NaN
def test_what_is_not_finite_shows_where_it_is_seen(gpu: torch.device) -> None:
    query, key, value, seen = states([3, 3], 1, 2, 2, 300, 32)
    key[0, 0, 3, 5] = NAN  # the second row alone sees it
    value[1, 0, 0, 7] = float("inf")
    (found,) = run(PLUGIN, [t.to(gpu) for t in (query, key, value, seen)], {"scale": 0.2})
    found = found.cpu()
    assert found[0, :, 0].isfinite().all()
    assert found[0, :, 1].isnan().all()
    assert found[1, :, :, 7].isinf().all()
    assert found[1, :, :, :7].isfinite().all()


@pytest.mark.parametrize("width", [36, 136, 160])
def test_there_is_no_kernel_for_other_heads(width: int, gpu: torch.device) -> None:
    """Rows that are not aligned, or too wide: never a wrong answer."""
    assert width % HEAD_MULTIPLE or width > LARGEST_HEAD
    with pytest.raises(ParameterError, match="no kernel for a size of"):
        check(states([1], 1, 1, 1, 4, width), gpu)


SIZES = st.tuples(*(st.integers(1, n) for n in (64, 32, 8, 4000, 40000)))


def shapes_of(sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    batch, key_heads, group, rows, positions = sizes
    query = batch, key_heads * group, rows, 128
    return {"query": query, "key": (batch, key_heads, positions, 128)}


def launched(step: PluginStep, shapes: dict[str, tuple[int, ...]]) -> bool:
    return all(size(shapes) > 0 for size in step.grid)


@settings(max_examples=examples(100), deadline=None)
@given(SIZES, SIZES)
def test_scratch_holds_every_part_and_never_shrinks(
    first: tuple[int, ...], other: tuple[int, ...]
) -> None:
    """An engine reserves what its largest inputs need: a few MB, however long they are."""
    shapes, larger = shapes_of(first), shapes_of(tuple(map(max, zip(first, other, strict=True))))
    found, more = (scratch_bytes(PLUGIN, s, "float16") for s in (shapes, larger))
    assert all(a <= b for a, b in zip(found, more, strict=True))
    assert sum(more) <= 16_384 * (128 + 2) * 4
    splits, rows = SPLIT(shapes), first[2] * first[3]
    assert 1 <= splits <= SPLITS
    if splits > 1:
        assert first[0] * first[1] * splits * rows * 128 * 4 <= found[0]
    few, many, join = PLUGIN.steps
    assert launched(few, shapes) == (rows <= FEW)
    assert launched(many, shapes) == (rows > FEW)
    assert launched(join, shapes) == (splits > 1)
    assert splits == splits_of(FEW if rows <= FEW else MANY)(shapes)


def test_a_gpu_is_kept_busy() -> None:
    """Decode of one row of a 7B with grouped heads: not 4 programs."""
    grid = PLUGIN.steps[0].grid
    programs = [size(shapes_of((1, 4, 7, 1, 4096))) for size in grid]
    assert programs == [32, 4, 1]
    full = [size(shapes_of((48, 32, 1, 1, 4096))) for size in grid]
    assert full[0] == 1  # rows enough


@st.composite
def prompts(draw: st.DrawFn) -> Inputs:
    """Rows in no order, some unused and NaN, as are keys and values beyond the lengths."""
    batch, key_heads, group = draw(st.sampled_from([(3, 1, 1), (1, 2, 3), (2, 1, 2)]))
    rows, positions = draw(st.integers(1, 5) | st.integers(62, 66)), draw(st.integers(1, 70))
    width, seed = draw(st.sampled_from(WIDTHS)), draw(st.integers(0, 1000))
    query, key, value, _ = states(
        [positions] * batch, key_heads, group, rows, positions, width, seed
    )
    random = torch.Generator().manual_seed(seed)
    slots = torch.randint(-1, positions + 1, (batch, rows), generator=random)
    if rows == positions and draw(st.booleans()):
        slots = torch.arange(rows).expand(batch, -1)
    length = torch.randint(1, positions + 1, (batch,), generator=random)
    unused = (slots < 0) | (slots >= length[:, None])
    padding = torch.arange(positions) >= length[:, None]
    query = query.masked_fill(unused[:, None, :, None], NAN)
    key, value = (t.masked_fill(padding[:, None, :, None], NAN) for t in (key, value))
    dtype = draw(st.sampled_from(DTYPES))
    return query.to(dtype), key.to(dtype), value.to(dtype), slots, length


@settings(max_examples=examples(5), deadline=None)
@given(inputs=prompts())
def test_scored_attention_is_the_reference(inputs: Inputs, gpu: torch.device) -> None:
    """Importance within the tolerance of CacheImportance."""
    scale = {"scale": inputs[0].shape[3] ** -0.5}
    expected = scored_attention.OP(*inputs, **scale)
    found = run(SCORED, [tensor.to(gpu) for tensor in inputs], scale)
    tolerances = (OP.tolerance[inputs[0].dtype], cache_importance.OP.tolerance[inputs[0].dtype])
    for have, want, tolerance in zip(found, expected, tolerances, strict=True):
        largest = max(1.0, float(want.double().abs().max()))
        error = (have.cpu().double() - want.double()).abs().max()
        assert float(error) <= tolerance * largest
