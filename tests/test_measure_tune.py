"""scripts/measure_tune.py: which candidate it takes for the best, and how much worse another is."""

from __future__ import annotations

import pytest
from measure_tune import best_of, worse

from lvlm.calibration.tune.candidates import Candidate
from lvlm.calibration.tune.limits import TuneLimits
from lvlm.calibration.tune.losses import Loss
from lvlm.calibration.tune.predictions import Prediction
from lvlm.calibration.tune.search import Trial
from lvlm.calibration.tune.speeds import SpeedRecord


def trial(keep: float, lost: float, speed: float, memory: int) -> Trial:
    return Trial(
        Candidate("divprune", "none", keep=keep),
        Prediction(memory, keep, 1.0),
        Loss(100, 1 - lost, 100 * lost, lost, 0.0),
        SpeedRecord("", 1.0, speed),
    )


FULL, SMALL, FAST, POOR = SOME = [
    trial(1.0, 0.0, 10.0, 100),
    trial(0.5, 0.05, 12.0, 50),
    trial(0.4, 0.05, 16.0, 60),
    trial(0.1, 0.3, 20.0, 40),
]


@pytest.mark.parametrize(
    ("limits", "best"),
    [
        (TuneLimits(max_loss=0.0), FULL),
        (TuneLimits(max_loss=0.05), FAST),
        (TuneLimits(max_loss=0.3), POOR),
        (TuneLimits(memory=60), FAST),  # of equal losses the faster
        (TuneLimits(memory=50), SMALL),
        (TuneLimits(memory=50, max_loss=0.3), POOR),
        (TuneLimits(memory=39), None),
    ],
)
def test_the_best_within_limits(limits: TuneLimits, best: Trial | None) -> None:
    assert best_of(SOME, limits) is best


def test_how_much_worse() -> None:
    """By speed where a loss is allowed, else by what is lost beyond the best."""
    assert worse(SMALL, FAST, TuneLimits(max_loss=0.05)) == pytest.approx(0.25)
    assert worse(POOR, SMALL, TuneLimits(memory=50)) == pytest.approx(0.25)
    assert worse(FAST, FAST, TuneLimits(max_loss=0.05)) == 0
    assert worse(None, None, TuneLimits(memory=39)) == 0
    assert worse(None, FAST, TuneLimits(memory=60)) == 1
