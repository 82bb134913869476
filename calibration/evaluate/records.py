"""Measurements, sample by sample: a file that an interrupted evaluation goes on from.

A record is found again by a key made of everything it depends on, so that changed options, data or
bundles never meet old records, and equal ones are never computed twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from lvlm.core.errors import BundleError, LvlmError
from lvlm.core.typed_json import decode

Run = Literal["forced", "greedy"]


class ResultsError(LvlmError):
    """Results cannot be written, or the folder belongs to something else."""


@dataclass(frozen=True)
class Record:
    """Something measured; ``key`` is made of everything that it depends on."""

    key: str


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class SampleRecord(Record):
    """One sample through one variant, in one of two runs.

    Forced run (the answer's tokens are fed): ``nll``, the sum over its ``tokens`` in nats. Greedy
    run: ``text`` of ``tokens`` tokens. ``kept``: entries left after prefill over prompt tokens,
    mean over layers; None if the wanted fraction is out of reach, then ``least`` is the smallest
    within it, and that is all. ``keep``: the solved option. Bytes are one row's: at the end, and
    allocated. Milliseconds are those of the batch.
    """

    sample: str
    kept: float | None = None
    least: float | None = None
    keep: float | None = None
    nll: float | None = None
    text: str | None = None
    tokens: int = 0
    cache_bytes_used: int = 0
    cache_bytes_allocated: int = 0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    decode_steps: int = 0


class RecordStore(Generic[R]):
    """The records of a ``kind`` in a file of JSON lines; what is added is on disk before ``add``
    returns."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        self._path = path
        self._records: dict[str, R] = {}
        try:
            data = path.read_bytes() if path.exists() else b""
            # A killed run may have left part of a line; the next one must not be glued to it.
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                path.write_bytes(whole)
            for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
                record = decode(kind, json.loads(line), f"line {number}")
                self._records[record.key] = record
        except (ValueError, BundleError) as error:
            reason = str(error).removesuffix("; export the bundle again")
            raise ResultsError(f"{path} is damaged ({reason}); remove it to start afresh") from None
        except OSError as error:
            raise _unwritable(path, error) from None

    def get(self, key: str) -> R | None:
        return self._records.get(key)

    def add(self, records: Iterable[R]) -> None:
        """Append records, all of them or, if the process is killed, none or some whole ones."""
        records = list(records)
        lines = "".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in records)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise _unwritable(self._path, error) from None
        self._records |= {r.key: r for r in records}


def key_of(**parts: Any) -> str:
    """A name for everything a record depends on, given as JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _unwritable(path: Path, error: OSError) -> ResultsError:
    return ResultsError(f"{path} cannot be read and written: {error.strerror or error}")
