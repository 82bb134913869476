"""``CacheAttention`` against one row at a time over the keys that it sees, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from single_node import feeds, session, single_node_model

from lvlm.core.errors import ParameterError
from lvlm.export.ops.cache_attention import OP
from lvlm.export.ops.op import OpSample
from lvlm.export.ops.parts import row_attention

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
RUNNER = session(single_node_model(OP, next(OP.samples())))  # of 6 heads on 2, of 64 numbers


def one_by_one(given: Inputs, scale: float, window: int) -> torch.Tensor:
    """Each row's own keys, cut out, and nothing else."""
    query, key, value, seen = given
    found = torch.zeros(query.shape, dtype=torch.float64)
    for batch, first in enumerate(seen.tolist()):
        for row in range(query.shape[2]):
            end = first + row
            begin = max(0, end - window) if window else 0
            for head in range(query.shape[1]):
                own = head // (query.shape[1] // key.shape[1])
                keys, values = (t[batch, own, begin:end].double() for t in (key, value))
                if keys.shape[0]:
                    logits = keys @ query[batch, head, row].double() * scale
                    found[batch, head, row] = logits.softmax(0) @ values
    return found


@st.composite
def calls(draw: st.DrawFn) -> tuple[Inputs, int]:
    """Rows that see nothing, too; keys behind a row's last are NaN."""
    batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    positions = rows + draw(st.integers(0, 9))
    seen = torch.tensor([draw(st.integers(0, positions - rows + 1)) for _ in range(batch)])
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    query = torch.randn(batch, 6, rows, 64, generator=random)
    key, value = torch.randn(2, batch, 2, positions, 64, generator=random)
    behind = torch.arange(positions) >= (seen + rows - 1)[:, None]
    key, value = (t.masked_fill(behind[:, None, :, None], float("nan")) for t in (key, value))
    return (query, key, value, seen), draw(st.sampled_from([0, 0, 1, 4]))


@settings(max_examples=examples(40), deadline=None)
@given(call=calls(), chunk=st.sampled_from([1, 2, 128]))
def test_matches_rows_one_by_one(call: tuple[Inputs, int], chunk: int) -> None:
    given, window = call
    right = one_by_one(given, 0.2, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_attention, "CHUNK", chunk)
        (found,) = OP(*given, scale=0.2, window=window)
    torch.testing.assert_close(found.double(), right, rtol=0, atol=2e-6)


@settings(max_examples=examples(20), deadline=None)
@given(call=calls())
def test_function_matches_rows_one_by_one(call: tuple[Inputs, int]) -> None:
    given, _ = call
    scale = next(OP.samples()).attributes["scale"]
    assert isinstance(scale, float)
    right = one_by_one(given, scale, 0)
    (found,) = RUNNER.run(None, feeds(OP, OpSample("call", given)))
    torch.testing.assert_close(torch.tensor(found).double(), right, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 3, 2, 8)}, "3 query heads are no multiple of 2 key heads"),
        ({"query": torch.zeros(1, 4, 2, 16)}, r"query \[B, Hq, R, d\] and key .* do not fit"),
        ({"value": torch.zeros(1, 2, 4, 8)}, r"key and value are \[B, Hkv, N, d\], seen \[B\]"),
        ({"seen": torch.zeros(1, 1).long()}, r"seen \[B\], not .* and \(1, 1\)"),
        ({"window": -1}, "window is -1; 0, or at least 1"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, object], message: str) -> None:
    states = torch.zeros(1, 2, 5, 8)
    inputs = {"query": torch.zeros(1, 4, 2, 8), "key": states, "value": states}
    given = {**inputs, "seen": torch.tensor([1]), "scale": 1.0, **change}
    with pytest.raises(ParameterError, match=message):
        OP.reference(**given)
