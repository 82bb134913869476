"""A peer's own format of a checkpoint, made once and kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from lvlm.bench.contenders import BenchError, Contender, Conversion
from lvlm.core.integrity import sha256_of
from lvlm.core.output import temporary_sibling
from lvlm.core.progress import Progress

DONE = ".complete"
MISSING = """
import sys
from importlib.util import find_spec
print([name for name in sys.argv[1:] if not find_spec(name)])
"""


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lvlm" / "bench"


def converted(
    contenders: Sequence[Contender],
    checkpoint: Path,
    folder: Path,
    pythons: Mapping[str, str],
    progress: Progress,
) -> dict[str, Path]:
    """The input of each peer, by label: ``checkpoint`` itself, or the folder it was converted to,
    now or before.

    ``folder`` keeps them. ``pythons`` has the interpreter of a peer's converter by name, this one's
    by default. Raises BenchError; no conversion begins before all converters were found.
    """
    sources, orders = dict[str, Path](), dict[Path, tuple[Contender, Conversion]]()
    for contender in contenders:
        assert contender.peer is not None
        conversion = contender.peer.conversion(tuple(contender.settings))
        out = checkpoint
        if conversion is not None:
            out = folder / f"{conversion.key}-{digest(checkpoint)}"
            if not (out / DONE).exists():
                _check_installed(contender.peer.name, conversion, pythons)
                orders[out] = contender, conversion
        sources[contender.label] = out
    progress.stages += len(orders)
    for out, (contender, conversion) in orders.items():
        assert contender.peer is not None
        python = pythons.get(contender.peer.name, sys.executable)
        with progress.stage(f"convert the checkpoint for {contender.label}"):
            _convert(contender.label, conversion, checkpoint, out, python)
    return sources


@cache
def digest(checkpoint: Path) -> str:
    """Digest of everything that a converter reads: weights, configs, tokenizer."""
    files = sorted(p for p in checkpoint.iterdir() if p.is_file() and not p.name.startswith("."))
    text = "".join(f"{path.name} {sha256_of(path)}\n" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_installed(name: str, conversion: Conversion, pythons: Mapping[str, str]) -> None:
    python = pythons.get(name, sys.executable)
    command = [python, "-c", MISSING, *conversion.modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BenchError(
            f"--converter-python {name}={python} does not start: {error.strerror or error}"
        ) from None
    if done.returncode or done.stdout.strip() != "[]":
        raise BenchError(
            f"--against {name}: its converter ({', '.join(conversion.modules)}) is not installed "
            f"for {python}; {conversion.advice}"
        )


def _convert(label: str, conversion: Conversion, checkpoint: Path, out: Path, python: str) -> None:
    """Into a folder beside ``out``, which appears complete or not at all."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"--cache {out.parent}: {error.strerror or error}") from None
    with temporary_sibling(out, BenchError) as work:
        _run(label, conversion, checkpoint, work, python)
        made = work / "out"
        (made / DONE).touch()
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)


def _run(label: str, conversion: Conversion, checkpoint: Path, work: Path, python: str) -> None:
    names = {
        "python": python,
        "here": sys.executable,
        "checkpoint": str(checkpoint),
        "work": str(work),
        "out": str(work / "out"),
    }
    for command in conversion.commands:
        words = [word.format(**names) for word in command]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            last = lines[-1] if lines else "no output"
            raise BenchError(f"{label}: the conversion failed ({last}); command: {' '.join(words)}")
