"""The image of merging: patches kept, merged and dropped, and how it is drawn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lvlm.core.errors import ParameterError
from lvlm.runtime.bundle.manifest import EncoderReduction, Images, Reduction
from lvlm.runtime.generate.answers import Generation, Stats
from lvlm.runtime.tools.show_merge import (
    GAP,
    MARGIN,
    PatchToken,
    after_each_reduction,
    merge_image,
)

STATS = Stats(0, 0, 0, (), (), (), 0, 0, 0, 0, 0, 0)
SIDE = 12  # an image of 2 x 3 patches, 6 x 4 pixels each; shown at 288 x 288
SHOWN = 288


def answer(image_id: list[int], *maps: list[int]) -> Generation:
    arrays = [np.array(m) for m in maps]
    return Generation("", [], "stop", STATS, np.array(image_id), arrays)


def model(tokens: int = 6, layers: tuple[int, ...] = (1,), **other: Any) -> Any:
    images = Images("<image>", 3, tokens, (2, 3), (SIDE, SIDE), {})
    reductions = tuple(Reduction(layer, 1.0, None, 0.1) for layer in layers)
    manifest = {"images": images, "reductions": reductions, "recipe": "lightvlm", "encoder": None}
    manifest |= other
    return SimpleNamespace(
        manifest=SimpleNamespace(**manifest),
        processor=SimpleNamespace(fit=Image.fromarray),
    )


def tokens_of(*tokens: tuple[list[int], list[int]]) -> list[PatchToken]:
    return [PatchToken(tuple(c), tuple(m)) for c, m in tokens]


# What became of each token


def test_order_tells_the_centre() -> None:
    # 1 takes in 4: were 4 the centre, it would come after 2 and 3.
    (state,) = after_each_reduction(answer([0, 1, 1, 1, 1, 0], [0, 1, 2, -1, 1, 3]))
    assert state == tokens_of(([0], [0]), ([1], [1, 4]), ([2], [2]), ([5], [5]))


def test_order_tells_the_centre_after_what_it_absorbs() -> None:
    # 4 takes in 1: were 1 the centre, it would come before 2 and 3.
    (state,) = after_each_reduction(answer([0, 1, 1, 1, 1, 0], [0, 3, 1, 2, 3, 4]))
    assert state[3] == PatchToken((4,), (1, 4))


def test_neighbours_may_both_be_the_centre() -> None:
    (state,) = after_each_reduction(answer([0, 1, 1, 1, 0], [0, 1, 1, 2, 3]))
    assert state == tokens_of(([0], [0]), ([1, 2], [1, 2]), ([3], [3]), ([4], [4]))


def test_maps_follow_one_another() -> None:
    first, second = after_each_reduction(
        answer(
            [0, 1, 1, 1, 1, 1, 0],
            [0, 1, 1, 2, 3, 1, 4],  # 1, 2 and 5 become one
            [0, -1, 1, 1, 2],  # which is dropped; 3 and 4 become one
        )
    )
    assert first[1] == PatchToken((1, 2), (1, 2, 5))
    assert second == tokens_of(([0], [0]), ([3, 4], [3, 4]), ([6], [6]))


def test_a_centre_that_is_absorbed_takes_its_members_along() -> None:
    _, second = after_each_reduction(answer([1, 1, 1, 0], [0, 1, 1, 2], [0, 0, 1]))
    assert second == tokens_of(([0, 1, 2], [0, 1, 2]), ([3], [3]))


def test_padding_of_a_batch_is_not_read() -> None:
    (state,) = after_each_reduction(answer([1, 1, 0], [0, 0, 1, 7, -1, 9]))
    assert [t.members for t in state] == [(0, 1), (2,)]


@given(st.integers(0, 10**6))
def test_any_true_history_is_among_the_possible(seed: int) -> None:
    """Random reductions whose centres are known: members are right, the centre is a candidate."""
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 20))
    history = {i: [i] for i in range(length)}  # place of each token -> members
    maps = []
    for _ in range(3):
        places = sorted(history)
        stays = rng.random(len(places)) < 0.7
        stays[rng.integers(len(places))] = True
        index = np.where(stays, stays.cumsum() - 1, -1)
        survivors = [p for p, s in zip(places, stays, strict=True) if s]
        new = {p: history[p] for p in survivors}
        for i, place in enumerate(places):
            if not stays[i] and rng.random() < 0.6:
                owner = int(rng.integers(len(survivors)))
                index[i] = owner
                new[survivors[owner]] = new[survivors[owner]] + history[place]
        maps.append(index.tolist())
        history = new
        state = after_each_reduction(answer([1] * length, *maps))[-1]
        assert [list(t.members) for t in state] == [sorted(history[p]) for p in sorted(history)]
        assert all(p in t.centres for p, t in zip(sorted(history), state, strict=True))


# How it is drawn


def patches(sheet: Image.Image, column: int, row: int = 0) -> np.ndarray:
    """The middle pixel [2, 3, 3] of each patch of a panel."""
    left = MARGIN + column * (SHOWN + GAP)
    top = MARGIN + row * (SHOWN + 24 + GAP)
    pixels = np.asarray(sheet)[top : top + SHOWN, left : left + SHOWN].astype(int)
    return pixels[SHOWN // 4 :: SHOWN // 2, SHOWN // 6 :: SHOWN // 3]


def flat(colour: tuple[int, int, int] = (200, 200, 200)) -> np.ndarray:
    return np.tile(np.array(colour, np.uint8), (SIDE, SIDE, 1))


def test_kept_merged_and_dropped_patches() -> None:
    # Text, patches 0 to 5, text: 0 absorbs 4 and 5, 1 and 3 stay, 2 goes.
    generation = answer([0, 1, 1, 1, 1, 1, 1, 0], [0, 1, 2, -1, 3, 1, 1, 4])
    sheet = merge_image(model(), [flat()], generation)
    np.testing.assert_array_equal(patches(sheet, 0), np.full((2, 3, 3), 200))
    shown = patches(sheet, 1).reshape(6, 3)
    for patch in (0, 1, 3):
        assert shown[patch].tolist() == [200, 200, 200]
    assert (shown[2] < 60).all()
    assert shown[4].tolist() == shown[5].tolist() != [200, 200, 200]
    assert np.ptp(shown[4]) > 60  # a colour


def test_the_outline_of_a_centre_has_the_colour_of_its_members() -> None:
    generation = answer([1] * 6, [0, 1, 2, 3, 0, 4])
    pixels = np.asarray(merge_image(model(), [flat()], generation)).astype(int)
    left = MARGIN + SHOWN + GAP
    edge, inside = pixels[MARGIN + 3, left + 40], pixels[MARGIN + SHOWN // 4, left + 40]
    member = patches(Image.fromarray(pixels.astype(np.uint8)), 1)[1, 1]
    assert inside.tolist() == [200, 200, 200]
    assert (np.argsort(edge) == np.argsort(member)).all()
    np.testing.assert_allclose(member, 0.62 * edge + 0.38 * 200, atol=2)
    thin = pixels[MARGIN, left + SHOWN // 2]  # of the kept patch beside it
    assert np.ptp(thin) < 20


def test_where_the_centre_is_unknown_all_are_tinted() -> None:
    generation = answer([1] * 6, [0, 0, 1, 2, 3, 4])
    shown = patches(merge_image(model(), [flat()], generation), 1).reshape(6, 3)
    assert shown[0].tolist() == shown[1].tolist() != [200, 200, 200]


@pytest.mark.parametrize(
    ("tokens", "dark"),
    [(6, 2), (7, 1), (5, 3)],
    ids=["grid", "class token", "first patch missing"],
)
def test_class_tokens_shift_the_patches(tokens: int, dark: int) -> None:
    """The token at place 2 is dropped."""
    merge_map = [i - (i > 2) if i != 2 else -1 for i in range(tokens)]
    sheet = merge_image(model(tokens), [flat()], answer([1] * tokens, merge_map))
    shown = patches(sheet, 1).reshape(6, 3)
    expected = {dark} | ({0} if tokens == 5 else set())
    assert {int(i) for i in np.flatnonzero((shown < 60).all(1))} == expected


def test_a_row_for_each_image_and_a_panel_for_each_reduction() -> None:
    generation = answer(
        [0, *[1] * 6, 0, *[2] * 6],
        [*range(13), -1],  # the second image's last patch goes
        [0, -1, *range(1, 12)],  # the first image's first
    )
    red, blue = (220, 60, 60), (60, 60, 220)
    sheet = merge_image(model(layers=(1, 4)), [flat(red), flat(blue)], generation)
    assert sheet.width == 2 * MARGIN + 3 * SHOWN + 2 * GAP
    assert patches(sheet, 0)[0, 0].tolist() == [220, 60, 60]
    assert patches(sheet, 0, 1)[0, 0].tolist() == [60, 60, 220]
    dark = [
        [int((patches(sheet, column, row).max(2) < 60).sum()) for column in (0, 1, 2)]
        for row in (0, 1)
    ]
    assert dark == [[0, 0, 1], [0, 1, 1]]


def test_pixels_beyond_the_last_patch_are_dark() -> None:
    """An image of 13 x 13 pixels has patches of 6 x 4: one row and column belong to none."""
    made = model()
    made.manifest.images = Images("<image>", 3, 6, (2, 3), (13, 13), {})
    image = np.full((13, 13, 3), 200, np.uint8)
    sheet = merge_image(made, [image], answer([1] * 6, list(range(6))))
    pixels = np.asarray(sheet)
    shown = 13 * 22  # the least multiple from 280 on
    left = MARGIN + shown + GAP
    assert (pixels[MARGIN + shown - 2, left + 5] < 60).all()
    assert (pixels[MARGIN + 5, left + shown - 2] < 60).all()
    assert (pixels[MARGIN + 5, left + 5] == 200).all()


def test_what_cannot_be_drawn() -> None:
    generation = answer([1] * 6, list(range(6)))
    with pytest.raises(ParameterError, match="recipe 'none' merges no image tokens"):
        merge_image(model(layers=(), recipe="none"), [flat()], generation)
    dropping = model(recipe="hybrid", encoder=EncoderReduction("divprune", 0.5, None))
    with pytest.raises(ParameterError, match="recipe 'hybrid' drops image tokens before"):
        merge_image(dropping, [flat()], generation)
    with pytest.raises(ParameterError, match="9 image tokens are not a grid of 2 x 3"):
        merge_image(model(9), [flat()], generation)
    for images in ([], [flat(), flat()]):
        with pytest.raises(ParameterError, match=rf"about 1 images and {len(images)} were given"):
            merge_image(model(), images, generation)
    with pytest.raises(ParameterError, match="about 0 images"):
        merge_image(model(), [], answer([0, 0], [0, 1]))
