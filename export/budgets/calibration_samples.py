"""Calibration samples: images with questions, built in or from a file of JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lvlm.core.errors import ParameterError
from lvlm.runtime.media.images import ImageSource

QUESTIONS = (
    "Describe the picture in detail.",
    "What is in the middle of the picture?",
    "How many things do you see, and where are they?",
    "Read all the text and numbers in the picture, from top to bottom.",
)
FORM = '{"image": "cat.jpg", "prompt": "What is this?"}'


@dataclass(frozen=True)
class CalibrationSample:
    """One question about images; ``where`` is what errors call it."""

    images: tuple[ImageSource, ...]
    prompt: str
    where: str


def builtin_samples() -> list[CalibrationSample]:
    """General questions about the images shipped with the package."""
    folder = resources.files("lvlm.assets") / "samples"
    images = [folder / f"digits-{i}.png" for i in (1, 2)]
    return [
        CalibrationSample((image.read_bytes(),), question, f"built-in {image.name}, '{question}'")
        for question in QUESTIONS
        for image in images
    ]


def read_samples(path: str | Path) -> list[CalibrationSample]:
    """The samples of a file, one JSON object per line: "image" is a path or a list of paths,
    relative to the file's folder, "prompt" the question; other keys are left alone.

    Raises ParameterError, which names file and line; images must exist, but are not opened here.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe or a device might never end
        raise ParameterError(f"the samples {path} are not a file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ParameterError(f"the samples {path} do not exist") from None
    except OSError as error:
        raise ParameterError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ParameterError(f"{path} is not UTF-8 text; give lines like {FORM}") from None
    lines = enumerate(text.split("\n"), 1)
    samples = [_sample(line, path, f"{path}:{n}") for n, line in lines if line.strip()]
    if not samples:
        raise ParameterError(f"{path} holds no samples; give lines like {FORM}")
    return samples


def samples_of(path: str | Path | None) -> list[CalibrationSample]:
    """Those of a file, or the built-in ones. Raises ParameterError."""
    return builtin_samples() if path is None else read_samples(path)


def what_of(path: str | Path | None) -> str:
    """The samples' name in messages."""
    return "built-in samples" if path is None else f"samples of {path}"


def _sample(line: str, path: Path, where: str) -> CalibrationSample:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"{where}: not JSON ({error}); write {FORM}") from None
    if not isinstance(data, dict):
        raise ParameterError(f"{where}: no JSON object; write {FORM}")
    for key in ("image", "prompt"):
        if key not in data:
            raise ParameterError(f'{where}: "{key}" is missing; write {FORM}')
    if not isinstance(data["prompt"], str):
        raise ParameterError(f'{where}: "prompt" is no text; write {FORM}')
    if not data["prompt"].strip():
        raise ParameterError(f'{where}: "prompt" is empty; write {FORM}')
    return CalibrationSample(_images(data["image"], path.parent, where), data["prompt"], where)


def _images(given: Any, folder: Path, where: str) -> tuple[Path, ...]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ParameterError(f'{where}: "image" is no path and no list of paths; write {FORM}')
    images = tuple(folder / name for name in names)
    for image in images:
        if not os.path.isfile(image):  # False, too, for a path that no system can have
            raise ParameterError(f"{where}: the image {image} does not exist")
    return images


def choose(
    samples: Sequence[CalibrationSample], count: int | None, seed: int, what: str
) -> list[CalibrationSample]:
    """``count`` of ``samples`` (None: all), drawn by ``seed``, in their order.

    Raises ParameterError if there are fewer; ``what`` is what it calls them.
    """
    if count is None:
        return list(samples)
    if not 1 <= count <= len(samples):
        raise ParameterError(f"{count} samples are asked for; give 1 to {len(samples)}, as {what}")
    drawn = np.random.default_rng(seed).permutation(len(samples))[:count]
    return [samples[i] for i in sorted(drawn)]
