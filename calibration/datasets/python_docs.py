"""The built-in text: stretches of Python's own reference manual, which every Python carries.

No image: what compression of the cache costs a language model on real text. A sample is a stretch
of a long chapter; its beginning is the prompt, what follows is the answer that is scored.
"""

from __future__ import annotations

from itertools import zip_longest
from pydoc_data.topics import topics
from typing import ClassVar

from lvlm.calibration.datasets.evaluation_samples import (
    DataError,
    Dataset,
    EvaluationRequest,
    EvaluationSample,
)

PROMPT, ANSWER = 6_000, 1_500  # characters; some 1,500 and 400 tokens


class PythonDocs(Dataset):
    """Data set ``text``: one stretch of each chapter, then a second one of each, and so on."""

    name: ClassVar[str] = "text"
    summary: ClassVar[str] = "built-in: long stretches of Python's reference manual, no images"

    def read(self, request: EvaluationRequest) -> list[EvaluationSample]:
        chapters = [_stretches(name, text) for name, text in sorted(topics.items())]
        found = [one for some in zip_longest(*chapters) for one in some if one is not None]
        if not found:
            raise DataError("this Python carries no manual (pydoc_data.topics); give a file")
        return found[: request.samples]


def _stretches(name: str, text: str) -> list[EvaluationSample]:
    """Whole ones of a chapter, cut between words."""
    found: list[EvaluationSample] = []
    while len(text) > PROMPT + ANSWER:
        end, stop = text.rfind(" ", 0, PROMPT), text.rfind(" ", 0, PROMPT + ANSWER)
        number = len(found) + 1
        found.append(
            EvaluationSample(
                f"{name}-{number}",
                (),
                text[:end].strip(),
                text[end:stop].strip(),
                f"text sample {name} {number}",
            )
        )
        text = text[stop:]
    return found


DATASET = PythonDocs()
