"""Lengths of caches that engines fix: every row of every buffer is aligned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm.runtime.bundle.manifest import Capacity
from lvlm.runtime.kv.static_capacity import aligned_capacity


@pytest.mark.parametrize("scored", [False, True])
@given(
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=4).map(tuple),
    heads=st.integers(1, 9),
    width=st.sampled_from([8, 32, 64, 80, 96, 128]),
    item=st.sampled_from([2, 4]),
)
def test_rows_begin_at_multiples_of_256_bytes(
    scored: bool, lengths: tuple[int, ...], heads: int, width: int, item: int
) -> None:
    given = Capacity(100, 1, lengths)
    found = aligned_capacity(given, heads * width * item, scored=scored)
    assert (found.max_text_len, found.max_images) == (100, 1)
    for before, after in zip(lengths, found.per_layer, strict=True):
        assert before <= after < before + 64
        assert after % 16 == 0
        assert after * heads * width * item % 256 == 0
        assert not scored or after * 4 % 256 == 0
    assert aligned_capacity(found, heads * width * item, scored=scored) == found
