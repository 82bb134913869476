"""The built-in task: held-out means never seen, answers are right, samples repeat."""

from __future__ import annotations

import numpy as np

from lvlm.calibration.datasets import digits


def test_splits_share_no_scan() -> None:
    train, heldout = digits._scans("train"), digits._scans("heldout")
    assert len(train[0]) + len(heldout[0]) == 1797
    seen = {scan.tobytes() for scan in train[0]}
    assert not any(scan.tobytes() in seen for scan in heldout[0])
    assert set(heldout[1]) == set(range(10))


def test_answers_follow_from_the_digits() -> None:
    for grid, q in digits.samples("heldout", 40, seed=3):
        assert grid.image.shape == (168, 168, 3)
        assert grid.image.dtype == np.uint8
        d = np.array(grid.digits).reshape(3, 3)
        named = [int(c) for c in q.answer if c.isdigit()]
        row = [i for i, name in enumerate(digits.ROW_NAMES) if f" {name} row" in q.question]
        if q.kind == "cell":
            column = [i for i, n in enumerate(digits.COLUMN_NAMES) if f" {n} column" in q.question]
            assert named == [d[row[0], column[0]]]
        elif q.kind == "row":
            assert named == d[row[0]].tolist()
        elif q.kind == "count":
            asked = int(next(c for c in q.question if c.isdigit()))
            rows = [[*row, (row == asked).sum()] for row in d]
            assert named == [*np.concatenate(rows), (d == asked).sum()]
        else:
            assert named == d.flatten().tolist()
            assert len(q.answer.split()) > 30


def test_samples_repeat_and_differ() -> None:
    first = [(g.image.tobytes(), q) for g, q in digits.samples("train", 8, seed=1)]
    again = [(g.image.tobytes(), q) for g, q in digits.samples("train", 8, seed=1)]
    other = [(g.image.tobytes(), q) for g, q in digits.samples("train", 8, seed=2)]
    assert first == again
    assert first[0] != other[0]
    assert {q.kind for _, q in first} == {"cell", "row", "count", "describe"}
