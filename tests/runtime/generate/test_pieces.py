"""Where a prompt may be cut whose image tokens see one another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.generate.pieces import border_before, border_behind, max_at_once, next_piece

CAUSAL = Images("<image>", 3, 7, (), (), {})
BOTH = replace(CAUSAL, bidirectional=True)


@settings(max_examples=examples(100))
@given(st.lists(st.integers(0, 7), max_size=6), st.integers(1, 12))
def test_pieces_are_all_of_a_prompt_and_no_image_is_cut(runs: list[int], tokens: int) -> None:
    """Text and images take turns, as long as ``runs`` says."""
    kinds = [number // 2 if number % 2 else 0 for number in range(2, 2 + len(runs))]
    image_id = np.array([0, *np.repeat(kinds, runs).astype(int)])
    for images in (CAUSAL, BOTH):
        start, read = 0, list[range]()
        while start < len(image_id):
            read.append(next_piece(image_id, start, tokens, images))
            start = read[-1].stop
        assert [place for piece in read for place in piece] == list(range(len(image_id)))
        assert max(map(len, read)) <= max_at_once(images, tokens)
        if images is CAUSAL:
            assert {len(piece) for piece in read[:-1]} <= {tokens}
        for cut in [piece.stop for piece in read[:-1]] if images is BOTH else []:
            assert image_id[cut] == 0 or image_id[cut] != image_id[cut - 1]


def test_borders() -> None:
    image_id = np.array([0, 1, 1, 1, 2, 2, 0])
    places = range(len(image_id) + 1)
    assert [border_before(image_id, place) for place in places] == [0, 1, 1, 1, 4, 4, 6, 7]
    assert [border_behind(image_id, place) for place in places] == [0, 1, 4, 4, 4, 6, 6, 7]
    assert max_at_once(CAUSAL, 3) == 3
    assert [max_at_once(BOTH, n) for n in (3, 9)] == [7, 9]
