"""Limits as people write them."""

from __future__ import annotations

import pytest

from lvlm.calibration.tune.limits import milliseconds, part
from lvlm.core.errors import ParameterError


@pytest.mark.parametrize(
    ("text", "wanted"), [("300ms", 300.0), ("1.5s", 1500.0), (" 20 MS ", 20.0), ("40", 40.0)]
)
def test_times(text: str, wanted: float) -> None:
    assert milliseconds(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"), [("1%", 0.01), ("0.02", 0.02), ("0", 0.0), ("5 %", 0.05)]
)
def test_parts(text: str, wanted: float) -> None:
    assert part(text) == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["", "fast", "0ms", "-1s", "1..2s", "nan", "1h", "1e999s"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ParameterError, match="write a time"):
        milliseconds(text)


@pytest.mark.parametrize("text", ["", "%", "100%", "1", "-0.1", "nan%", "inf", "a little"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(ParameterError, match="write a part"):
        part(text)
