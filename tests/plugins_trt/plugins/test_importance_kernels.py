"""The kernels of ``TokenImportance`` and ``CacheImportance`` against the ops' torch references."""

from __future__ import annotations

import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from scratch import scratch_bytes

from lvlm.export.ops import cache_importance, token_importance
from lvlm.export.ops.op import Op
from lvlm.plugins_trt.plugins.plan_runner import run
from lvlm.plugins_trt.plugins.registry import plugins

NAN, INF = float("nan"), float("inf")
CACHE, TOKEN = cache_importance.OP, token_importance.OP
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [32, 64, 80, 96, 128, 36]  # the last is no multiple of 8: a kernel of its own
Inputs = tuple[torch.Tensor, ...]


def check(op: Op, inputs: Inputs, device: torch.device) -> torch.Tensor:
    """The kernels' importance, which must be the reference's and not finite at the same places."""
    scale = {"scale": inputs[0].shape[3] ** -0.5}
    (expected,) = op(*inputs, **scale)
    (found,) = run(plugins()[op.name], [tensor.to(device) for tensor in inputs], scale)
    found = found.cpu()
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    error = (found - expected)[finite].abs()
    largest = max(1.0, float(expected[finite].abs().max())) if finite.any() else 1.0
    assert not error.numel() or float(error.max()) <= op.tolerance[inputs[0].dtype] * largest
    return found


def states(
    batch: int, key_heads: int, group: int, rows: int, positions: int, width: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """Query and key in fp32, and what goes on making numbers."""
    random = torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(batch, key_heads * group, rows, width, generator=random)
    return query, torch.randn(batch, key_heads, positions, width, generator=random), random


@st.composite
def cases(draw: st.DrawFn, op: Op) -> Inputs:
    """Rows in no order, some unused; lengths ragged; NaN in padding and in unused queries.

    Sizes are about those of a tile, 64 keys, and of a split, 256.
    """
    batch, key_heads, group = draw(st.sampled_from([(3, 1, 1), (2, 1, 2), (1, 2, 3), (2, 2, 1)]))
    block = 64 if op is CACHE else 16
    rows = draw(st.integers(1, 5) | st.integers(block - 2, block + 2))
    positions = draw(st.integers(1, 10) | st.integers(60, 70) | st.integers(255, 260))
    width, dtype = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 1000))
    query, key, random = states(batch, key_heads, group, rows, positions, width, seed)
    slots = torch.randint(-1, positions + 1, (batch, rows), generator=random)
    if op is CACHE:
        valid = torch.randint(1, positions + 1, (batch,), generator=random)
        unused = (slots < 0) | (slots >= valid[:, None])
        padding = torch.arange(positions) >= valid[:, None]
        query = query.masked_fill(unused[:, None, :, None], NAN)
        key = key.masked_fill(padding[:, None, :, None], NAN)
    else:  # the reference multiplies what nobody sees: it is replaced in a test of its own
        valid = torch.randint(-1, 3, (batch, positions), generator=random)
        ends = torch.randint(0, positions, (batch, 2), generator=random).sort(dim=1).values
        middle = (torch.arange(positions) >= ends[:, :1]) & (torch.arange(positions) < ends[:, 1:])
        valid = valid.masked_fill(middle, -1)  # whole tiles of padding, too
    return query.to(dtype), key.to(dtype), slots, valid


@settings(max_examples=examples(8), deadline=None)
@given(case=cases(CACHE))
def test_cache_importance(case: Inputs, gpu: torch.device) -> None:
    check(CACHE, case, gpu)


@settings(max_examples=examples(8), deadline=None)
@given(case=cases(TOKEN))
def test_token_importance(case: Inputs, gpu: torch.device) -> None:
    check(TOKEN, case, gpu)


def test_cache_importance_of_a_long_prompt(gpu: torch.device) -> None:
    query, key, random = states(1, 1, 1, 64, 4096, 32)
    slots = torch.randint(0, 4000, (1, 64), generator=random)
    found = check(CACHE, (query.half(), key.half(), slots, torch.tensor([4000])), gpu)
    assert float(found.sum()) == pytest.approx(64, abs=1e-4)


def test_token_importance_of_a_long_prompt(gpu: torch.device) -> None:
    query, key, _ = states(1, 1, 7, 1, 4096, 32)
    ids = torch.ones(1, 4096, dtype=torch.int64)
    ids[0, :1500] = -1
    inputs = (query.bfloat16(), key.bfloat16(), torch.tensor([[4000]]), ids)
    assert float(check(TOKEN, inputs, gpu).sum()) == pytest.approx(1, abs=1e-5)


def test_a_causal_prompt(gpu: torch.device) -> None:
    query, key, _ = states(2, 1, 2, 140, 140, 32)
    slots = torch.arange(140).expand(2, -1)
    found = check(CACHE, (query, key, slots, torch.tensor([140, 71])), gpu)
    assert found.sum(dim=1).tolist() == pytest.approx([140, 71], abs=1e-3)


@pytest.mark.parametrize("op", [CACHE, TOKEN], ids=lambda op: op.name)
def test_what_is_not_finite_shows(op: Op, gpu: torch.device) -> None:
    """NaN in a used query or valid key; infinite logits in some tiles of a row, and in all."""
    query, key, _ = states(6, 1, 2, 3, 330, 32)
    slots = torch.tensor([[329, 3, 300]]).expand(6, -1)
    query[0, 1, 1, 5] = NAN
    key[1, 0, 310, 7] = NAN  # the first row alone sees it
    query[2:, :, :, 0] = 1
    key[2, 0, 301, 0] = INF
    key[3, 0, :64, 0] = -INF  # a tile that gives nothing; the middle row sees no other
    key[4, 0, :256, 0] = -INF  # a split that gives nothing
    key[5, 0, :, 0] = -INF
    valid = torch.full((6,), 330) if op is CACHE else torch.zeros(6, 330, dtype=torch.int64)
    found = check(op, (query, key, slots, valid), gpu)
    assert not found[0, :4].isfinite().any()
    assert found[0, 4:].isfinite().all()
    assert found[3, 64:].isfinite().all()


def test_what_nobody_sees_goes_nowhere(gpu: torch.device) -> None:
    """NaN in unused queries and in padding of ``TokenImportance``."""
    query, key, _ = states(2, 2, 2, 3, 300, 64)
    index, ids = torch.tensor([[299, -1, 270]]).expand(2, -1), torch.zeros(2, 300).long()
    ids[0, 100:200] = ids[1, :290] = -1
    clean = query.masked_fill((index < 0)[:, None, :, None], 0)
    dirty = query.masked_fill((index < 0)[:, None, :, None], NAN)
    scale = {"scale": 0.125}
    (expected,) = TOKEN(clean, key, index, ids, **scale)
    key = key.masked_fill((ids < 0)[:, None, :, None], NAN)
    inputs = [tensor.to(gpu) for tensor in (dirty, key, index, ids)]
    (found,) = run(plugins()[TOKEN.name], inputs, scale)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("op", [CACHE, TOKEN], ids=lambda op: op.name)
def test_without_queries_nothing_is_received(op: Op, gpu: torch.device) -> None:
    query, key, _ = states(2, 1, 2, 0, 70, 32)
    valid = torch.tensor([70, 3]) if op is CACHE else torch.zeros(2, 70, dtype=torch.int64)
    assert not check(op, (query, key, torch.zeros(2, 0, dtype=torch.int64), valid), gpu).any()


SIZES = st.tuples(*(st.integers(1, n) for n in (3, 4, 8, 4000, 40000)))


@settings(max_examples=examples(50), deadline=None)
@given(SIZES, SIZES)
def test_scratch_never_shrinks_as_inputs_grow(
    first: tuple[int, ...], other: tuple[int, ...]
) -> None:
    """An engine reserves what its largest inputs need, and no R x N matrix is in it."""

    def needed(op: Op, sizes: tuple[int, ...]) -> list[int]:
        batch, key_heads, group, rows, positions = sizes
        shapes = {
            "query": (batch, key_heads * group, rows, 64),
            "key": (batch, key_heads, positions, 64),
        }
        plugin = plugins()[op.name]
        most, parts = (2048, group) if op is CACHE else (512, 1)
        splits = plugin.steps[0].grid[1](shapes)
        assert splits * group * rows <= max(group * rows, most)
        found = scratch_bytes(plugin, shapes, "float16")
        formula = 8 * max(group * rows, most) + 4 * parts * positions
        assert 0 <= sum(found) - formula * batch * key_heads < 3 * 256  # each is rounded up
        return found

    larger = tuple(map(max, zip(first, other, strict=True)))
    for op in (CACHE, TOKEN):
        assert all(a <= b for a, b in zip(needed(op, first), needed(op, larger), strict=True))
