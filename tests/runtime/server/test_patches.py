"""What became of each patch, beside a loop over the maps, patch by patch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.generate.answers import Generation, SeenImage, Stats
from lvlm.runtime.media.prepared_image import WHOLE
from lvlm.runtime.server.patch_grids import DROPPED, KEPT, patches

STATS = Stats(0, 0, 0, (), (), (), 0, 0, 0, 0, 0, 0)


def manifest(grid: tuple[int, ...] = (), tokens: int = 0, size: tuple[int, ...] = ()) -> Any:
    return SimpleNamespace(images=Images("<image>", 3, tokens, grid, size, {}), encoder=None)


def answer(image_id: list[int], maps: list[list[int]], images: list[SeenImage]) -> Generation:
    arrays = [np.array(one) for one in maps]
    return Generation("", [], "stop", STATS, np.array(image_id), arrays, images=images)


def seen(tokens: int, rows: list[int] | None = None, grid: Any = None) -> SeenImage:
    numbers = list(range(tokens)) if rows is None else rows
    return SeenImage(np.array(numbers), WHOLE, None if grid is None else np.array(grid))


def naive(given: Generation) -> list[list[list[int]]]:
    """Follow every token of every image through the maps, then look who ended where."""
    ends: dict[tuple[int, int], int] = {}
    for number, image in enumerate(given.images, 1):
        place = -1
        for row in image.rows.tolist():
            place = given.image_id.tolist().index(number, place + 1)
            now = place
            for full in given.merge_maps:
                if now >= 0:
                    now = int(full[now])
            if now >= 0:
                ends[number, row] = now
    together = [end for end in ends.values() if list(ends.values()).count(end) > 1]
    groups = {end: 1 + at for at, end in enumerate(sorted(set(together)))}
    found = []
    for number, image in enumerate(given.images, 1):
        assert image.grid is not None
        lines = []
        for line in image.grid.tolist():
            lines.append([])
            for token in line:
                end = ends.get((number, token))
                lines[-1].append(DROPPED if end is None else groups.get(end, KEPT))
        found.append(lines)
    return found


@st.composite
def answers(draw: st.DrawFn) -> Generation:
    """Two images at most, some of whose tokens go on; then up to three reductions of them."""
    image_id, images = [0], []
    for number in range(1, draw(st.integers(0, 2)) + 1):
        rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        extra = draw(st.integers(0, 2))  # of a class, of lines, of a copy of the whole
        numbers = draw(st.permutations(range(rows * columns + extra)))
        on = sorted(draw(st.sets(st.sampled_from(numbers), min_size=1)))
        grid = np.array(numbers[: rows * columns]).reshape(rows, columns)
        if draw(st.booleans()):
            grid[0, 0] = -1
        images.append(seen(0, on, grid))
        image_id += [number] * len(on) + [0]
    maps, left = [], list(image_id)  # what is left, by its image
    for _ in range(draw(st.integers(0, 3))):
        merged, after, groups = [], list[int](), dict[int, list[int]]()
        for number in left:
            fate = draw(st.sampled_from(["stays", "goes", "joins"])) if number else "stays"
            if fate == "joins" and groups.get(number):
                merged.append(draw(st.sampled_from(groups[number])))
            elif fate == "goes":
                merged.append(-1)
            else:
                merged.append(len(after))
                groups.setdefault(number, []).append(len(after))
                after.append(number)
        maps.append(merged + [-1] * draw(st.integers(0, 2)))  # padding
        left = after
    return answer(image_id, maps, images)


@given(answers())
def test_beside_a_loop(given: Generation) -> None:
    expected = naive(given)
    found = patches(manifest(), given)
    assert len(found) == len(expected) == len(given.images)
    for told, lines in zip(found, expected, strict=True):
        assert (told["rows"], told["columns"]) == (len(lines), len(lines[0]))
        assert told["patches"] == [fate for line in lines for fate in line]
        assert told["box"] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(4, [KEPT, DROPPED, 1, 1]), (5, [DROPPED, 1, 1, KEPT]), (3, [DROPPED, KEPT, DROPPED, 1])],
    ids=["", "a class token first", "no token of the first patch"],
)
def test_a_grid_of_all_images(tokens: int, expected: list[int]) -> None:
    """0 stays, 1 goes, 2 and 3 become one, 4 stays; 3 tokens are without their last two."""
    ends = [0, -1, 1, 1, 2][:tokens]
    told = answer([1] * tokens, [ends], [seen(tokens)])
    if tokens == 3:  # the third one joins with text, say
        told = answer([1, 1, 1, 0], [[0, -1, 1, 1]], [seen(tokens)])
    (found,) = patches(manifest((2, 2), tokens, (30, 28)), told)
    assert found.pop("patches") == expected
    assert found == {"rows": 2, "columns": 2, "box": [0, 0, 1, 1], "encoder_merges": False}


def test_pixels_beyond_the_last_patch_have_none() -> None:
    (found,) = patches(manifest((2, 3), 6, (29, 31)), answer([1] * 6, [], [seen(6)]))
    assert found["box"] == [0, 0, round(30 / 31, 5), round(28 / 29, 5)]
    assert found["patches"] == [KEPT] * 6


def test_without_a_grid_or_images() -> None:
    assert patches(manifest(), answer([0, 1, 1], [], [seen(2)])) == []
    assert patches(manifest((1, 2), 4), answer([0, 1, 1, 1, 1], [], [seen(4)])) == []
    assert patches(manifest((1, 2), 2), answer([0, 0], [], [])) == []
