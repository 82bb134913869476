"""Parts shared by data sets that are files: JSON with the place of a mistake, entries, images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm.calibration.datasets.evaluation_samples import DataError, EvaluationRequest


@dataclass(frozen=True)
class DatasetEntry:
    """One entry of a file; ``where`` names it in messages."""

    id: str
    data: Any
    where: str

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: '{key}' is {_kind(value)}; give a text")
        return value

    def get(self, key: str) -> Any:
        if not isinstance(self.data, dict):
            raise DataError(f"{self.where} is {_kind(self.data)}; give an object with '{key}'")
        if key not in self.data:
            raise DataError(f"{self.where} lacks '{key}'; add it")
        return self.data[key]

    def images(self, key: str, root: Path) -> tuple[Path, ...]:
        """The image, or list of images, under ``key``; paths start from ``root``."""
        value = self.get(key)
        names = value if isinstance(value, list) else [value]
        for name in names:
            if not isinstance(name, str) or not name:
                raise DataError(f"{self.where}: '{key}' is {_kind(name)}; give a path or several")
        paths = tuple(root / name for name in names)
        for path in paths:
            if not path.is_file():
                raise DataError(
                    f"{self.where}: the image {path} does not exist; put it there, or name its "
                    "folder with --images"
                )
        return paths


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def parse(text: str, where: str) -> Any:
    """``text`` as JSON; DataError names ``where`` it is broken."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text else ""
        place = f"{line}column {error.colno}"
        raise DataError(f"{where} is not JSON ({error.msg}, {place}); mend it") from None
    except RecursionError:
        raise DataError(f"{where} is nested too deeply; mend it") from None


def first(
    entries: Sequence[DatasetEntry], path: Path, request: EvaluationRequest
) -> Sequence[DatasetEntry]:
    """The first entries, as many as are wanted; DataError if there are fewer."""
    if not entries:
        raise DataError(f"{path} holds no samples; give a file with at least one")
    if request.samples is not None and request.samples > len(entries):
        raise DataError(
            f"{path} has {len(entries)} samples, --samples asks for {request.samples}; "
            f"give {len(entries)} or fewer"
        )
    return entries[: request.samples]


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return repr(value)[:60]
