"""The built-in task: held-out means never seen, answers are right, samples repeat."""

from __future__ import annotations

from lvlm.calibration.datasets import digits
from lvlm.calibration.datasets.scenes import glyphs
from lvlm.calibration.datasets.scenes.drawing import DENSITIES
from lvlm.calibration.datasets.scenes.questions import KINDS, said


def test_splits_share_no_scan() -> None:
    train, heldout = glyphs._scans("train"), glyphs._scans("heldout")
    assert len(train[0]) + len(heldout[0]) == 1797
    seen = {scan.tobytes() for scan in train[0]}
    assert not any(scan.tobytes() in seen for scan in heldout[0])
    assert set(heldout[1]) == set(range(10))


def test_every_kind_is_asked_of_every_density() -> None:
    count = len(KINDS) * len(DENSITIES)
    drawn = list(digits.samples("heldout", count, seed=3))
    assert {(a.kind, a.scenes[0].density) for a in drawn} == {
        (kind, density) for kind in KINDS for density in DENSITIES
    }
    for asked in drawn:
        assert len(asked.scenes) == (2 if asked.kind == "pictures" else 1)
        assert len(asked.before) == (asked.kind == "turns")
        if asked.kind == "list":
            assert asked.answer == ", ".join(said(t) for t in asked.scenes[0].things)


def test_samples_repeat_and_differ() -> None:
    def drawn(seed: int) -> list[tuple[bytes, str, str]]:
        found = digits.samples("train", 8, seed=seed)
        return [(a.scenes[0].image.tobytes(), a.question, a.answer) for a in found]

    assert drawn(1) == drawn(1)
    assert drawn(1)[0] != drawn(2)[0]
