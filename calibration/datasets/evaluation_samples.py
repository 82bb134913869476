"""The samples of an evaluation: a question about images and the answer that is scored.

Data sets are found by discovery: each file of ``datasets/`` with a ``DATASET`` is one. Everything
about a data set is checked here and there before any model is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from lvlm.core.discovery import discover, nearest
from lvlm.core.errors import ImageError, LvlmError, ParameterError
from lvlm.core.wrapping import wrapped
from lvlm.runtime.media.images import open_image

PLACEHOLDER = "<image>"  # an image's place in a prompt, as LLaVA's files write it


class DataError(LvlmError, ValueError):
    """A data set is missing, malformed, or has too few samples."""


@dataclass(frozen=True, eq=False)
class EvaluationSample:
    """One question and its answer.

    images  paths, or uint8 arrays [H,W,3]
    prompt  may have ``<image>`` once per image where it belongs; otherwise they come first
    where   names the sample in messages: file and line or entry
    before  questions of the same conversation, and their answers, which images come first in then
    """

    id: str
    images: tuple[Path | np.ndarray, ...]
    prompt: str
    answer: str
    where: str
    before: tuple[tuple[str, str], ...] = ()

    def check(self) -> None:
        """Raises DataError if a text is empty, placeholders do not match the images, or one of
        them is missing or cannot be read."""
        for name in ("prompt", "answer"):
            if not getattr(self, name).strip():
                raise DataError(f"{self.where}: the {name} is empty; give it text")
        said = [text for turn in self.before for text in turn]
        if not all(text.strip() for text in said):
            raise DataError(f"{self.where}: an earlier question or answer is empty; give it text")
        if self.before and any(PLACEHOLDER in text for text in (*said, self.prompt)):
            raise DataError(
                f"{self.where}: {PLACEHOLDER} in a conversation, whose images come first; leave it "
                "out"
            )
        places = self.prompt.count(PLACEHOLDER)
        if places not in (0, len(self.images)):
            raise DataError(
                f"{self.where}: {places} {PLACEHOLDER} in the prompt for {len(self.images)} "
                "image(s); write one per image, or none"
            )
        for image in self.images:
            try:
                open_image(image)
            except ImageError as error:
                raise DataError(f"{self.where}: {error}") from None

    def digest(self) -> str:
        """sha256 of what the sample holds, wherever its files are; of these as they were when it
        was first asked for."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        found = hashlib.sha256()
        for text in (self.prompt, self.answer, *(text for turn in self.before for text in turn)):
            found.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        for image in self.images:
            if isinstance(image, np.ndarray):
                data = repr(image.shape).encode() + image.tobytes()
            else:
                data = image.read_bytes()
            found.update(hashlib.sha256(data).digest())
        return found.hexdigest()


@dataclass(frozen=True)
class EvaluationRequest:
    """A request to a data set. ``samples`` None: all, or its own default."""

    path: Path | None = None
    images: Path | None = None
    samples: int | None = None
    kinds: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ParameterError(f"--samples is {self.samples}; give 1 or more")


class Dataset:
    """One layout of a file, or one built-in set (``suffix`` None)."""

    name: ClassVar[str]
    summary: ClassVar[str]
    suffix: ClassVar[str | None] = None
    kinds: ClassVar[tuple[str, ...]] = ()

    def read(self, request: EvaluationRequest) -> list[EvaluationSample]:
        """The first ``samples`` samples, not yet checked. Raises DataError."""
        raise NotImplementedError


def read_samples(
    data: str,
    *,
    layout: str | None = None,
    images: Path | None = None,
    samples: int | None = None,
    kinds: Sequence[str] = (),
) -> list[EvaluationSample]:
    """The checked samples of ``data``: the name of a built-in set, or a file.

    ``layout`` names the file's; None: the only one of its suffix. ``images`` is the folder that the
    file's paths start from. Raises DataError, ParameterError.
    """
    found = _dataset(data, layout)
    path = Path(data) if found.suffix else None
    if images is not None and path is None:
        raise ParameterError(f"--images is for files; the data set '{data}' makes its own images")
    if images is not None and not images.is_dir():
        raise ParameterError(f"--images {images}: there is no such folder")
    for kind in kinds:
        if not found.kinds:
            raise ParameterError(f"--kinds is for data sets with kinds; '{found.name}' has none")
        if kind not in found.kinds:
            raise nearest("kind", kind, found.kinds)
    chosen = found.read(EvaluationRequest(path, images, samples, tuple(dict.fromkeys(kinds))))
    for sample in chosen:
        sample.check()
    return chosen


def listing() -> str:
    """The data sets and the layouts of files, a line each."""
    known: dict[str, Dataset] = discover("lvlm.calibration.datasets", "DATASET")
    width = max(map(len, known))
    return "\n".join(
        wrapped(f"{name:{width}}  ", dataset.summary) for name, dataset in known.items()
    )


def _dataset(data: str, layout: str | None) -> Dataset:
    known: dict[str, Dataset] = discover("lvlm.calibration.datasets", "DATASET")
    built_in = [name for name, dataset in known.items() if dataset.suffix is None]
    if layout is not None and layout not in known:
        raise nearest("format", layout, set(known) - set(built_in))
    if data in built_in:
        if layout not in (None, data):
            raise ParameterError(f"--format is for files; '{data}' is a built-in data set")
        return known[data]
    path = Path(data)
    if not path.suffix and not path.exists():
        raise nearest("data set", data, built_in)
    if not path.is_file():
        raise DataError(f"--data {data}: there is no such file")
    fitting = [name for name, dataset in known.items() if dataset.suffix == path.suffix]
    if layout is not None:
        if layout in built_in:
            raise ParameterError(f"--format {layout} is a built-in data set; write --data {layout}")
        return known[layout]
    if len(fitting) != 1:
        layouts = ", ".join(fitting or sorted(set(known) - set(built_in)))
        raise ParameterError(f"--data {data}: which layout? give --format, one of {layouts}")
    return known[fitting[0]]
