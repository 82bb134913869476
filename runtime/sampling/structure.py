"""Structure of an answer: which tokens may come next, by llguidance."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lvlm.core.errors import LvlmError, ParameterError

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Structure:
    """A structure that has been compiled for a tokenizer; any number of answers may have it.

    ``name`` is the option's, ``matcher`` llguidance's at the beginning; ``eos_ids`` end a text.
    """

    name: str
    matcher: Any
    eos_ids: Collection[int]

    def begin(self) -> Place:
        """The place of a new answer in it."""
        return Place(self)


class Place:
    """Place that one answer has reached in its structure. For one thread at a time.

    ``complete``: it may end, and nothing else may follow.
    """

    def __init__(self, structure: Structure) -> None:
        self._name, self._eos_ids = structure.name, structure.eos_ids
        with failures(self._name):
            self._matcher = structure.matcher.deep_copy()
        self.complete = False

    def masked(self, scores: Scores, logits: Scores) -> Scores:
        """``scores`` [vocab] with -inf for what may not come next. If they have all that may come
        at -inf already, ``logits`` are taken: what else forbids tokens gives way.

        Raises ParameterError where it takes too much work to tell.
        """
        with failures(self._name):
            mask = self._matcher.compute_bitmask()
            self._check()
        bits = np.frombuffer(mask, np.uint8)
        allowed = np.unpackbits(bits, count=scores.size, bitorder="little").view(bool)
        for each in (scores, logits):
            masked = np.where(allowed, each, np.float32(-np.inf))
            if masked.max() > -np.inf:
                return masked
        raise _unfollowed(self._name, "the model lacks every token that may come next")

    def chosen(self, token: int) -> None:
        """The answer's next token. Raises ParameterError as ``masked``."""
        if token in self._eos_ids:
            return
        with failures(self._name):
            self._matcher.consume_token(token)
            self._check()
            self.complete = self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _unfollowed(self._name, said(self._matcher.get_error()))


@contextmanager
def failures(name: str) -> Iterator[None]:
    """Whatever goes wrong in llguidance becomes a ParameterError; a panic, too, is no Exception."""
    try:
        yield
    except LvlmError:
        raise
    except Exception as error:
        raise _unfollowed(name, said(error)) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise _unfollowed(name, said(error)) from None


def said(error: object) -> str:
    """llguidance's message in a line: where, and what."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    first = lines[0].partition("; following")[0] if lines else "no reason was given"
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if reasons:  # behind a copy of the regular expression
        first = f"{first.partition(':')[0]}: {reasons[0]}"
    return first[:300].rstrip(" .")


def _unfollowed(name: str, reason: str) -> ParameterError:
    return ParameterError(f"{name} cannot be followed ({reason}); give a simpler one")
