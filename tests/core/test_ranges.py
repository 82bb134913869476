"""Numbers that a user gives: what is let through, and the one line for what is not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lvlm.core.errors import ParameterError
from lvlm.core.ranges import fraction, integer


@pytest.mark.parametrize("value", [1, 1.0, 0.5, 1e-9, np.float32(0.25)])
def test_fractions_are_floats_as_they_were_given(value: float) -> None:
    found = fraction("keep", value)
    assert type(found) is float
    assert found == value


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.01, math.nan, math.inf, True, "0.5", None])
def test_what_is_no_fraction_is_refused_by_name(value: object) -> None:
    with pytest.raises(ParameterError) as error:
        fraction("keep", value)
    assert str(error.value) == f"keep is {value!r}; give a number above 0 and up to 1"


@pytest.mark.parametrize(("value", "minimum"), [(1, 1), (0, 0), (7, 1), (10**30, 1), (-3, -3)])
def test_integers_of_the_minimum_or_more(value: int, minimum: int) -> None:
    integer("slots", value, minimum)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None])
def test_what_is_no_such_integer_is_refused_by_name(value: object) -> None:
    with pytest.raises(ParameterError) as error:
        integer("slots", value, 1)
    assert str(error.value) == f"slots is {value!r}; give an integer of 1 or more"
