"""Numbers that a user or a file gives, checked: one wording for what they may be."""

from __future__ import annotations

from numbers import Real

from lvlm.core.errors import ParameterError


def fraction(name: str, value: object) -> float:
    """``value`` as a float. Raises ParameterError unless it is a number in (0, 1]."""
    # NaN fails every comparison
    usable = isinstance(value, Real) and not isinstance(value, bool)
    if not usable or not 0 < (number := float(value)) <= 1:  # type: ignore[arg-type]
        raise ParameterError(f"{name} is {value!r}; give a number above 0 and up to 1")
    return number


def integer(name: str, value: object, minimum: int) -> None:
    """ParameterError unless ``value`` is an integer of ``minimum`` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ParameterError(f"{name} is {value!r}; give an integer of {minimum} or more")
