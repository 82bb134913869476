"""PrefixKV's published budgets as a profile: fractions evicted become fractions kept.

The files of that repository's folder confs/ are JSON lists with a number for each layer, the part
of its entries that is evicted: 0.2 in a file's name, and its ``--ratio``, means that a fifth goes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from lvlm.core.errors import ParameterError, shown
from lvlm.export.budgets.measuring import TOOLS
from lvlm.export.budgets.prefix_profiles import (
    SCHEMA,
    DataId,
    LayerSpread,
    PrefixProfile,
    RecipeId,
    identify,
)
from lvlm.export.checkpoint import checkpoint as checkpoints
from lvlm.runtime.policies.shares import ProfileRow


def published(
    model: str, revision: str | None, files: Sequence[Path], keep: float
) -> PrefixProfile:
    """The profile of a model from one or more files, made for what is nearest to ``keep`` in them.

    Raises ParameterError for a file that is none, or for another number of layers.
    """
    checkpoint = checkpoints.resolve(model, revision)
    with checkpoints.described_by(checkpoint):
        family = checkpoints.find_family(checkpoint.config, checkpoint.source)
        config = family.read_config(checkpoint.config)
        layers = int(config.get_text_config().num_hidden_layers)
        rows = sorted((_row(file, layers) for file in files), key=lambda row: row.keep)
        keeps = [row.keep for row in rows]
        if len(set(keeps)) < len(keeps):
            raise ParameterError("two of the files keep the same part of the cache; give one")
        return PrefixProfile(
            kind="prefixkv",
            schema=SCHEMA,
            keep=min(keeps, key=lambda one: abs(one - keep)),
            rows=tuple(rows),
            spread=LayerSpread((0.0,) * layers, ()),
            layers=layers,
            model=identify(checkpoint),
            data=DataId(_digest(files), 0),
            recipe=RecipeId("none", {}),
            tools={name: metadata.version(name) for name in TOOLS},
        )


def _row(file: Path, layers: int) -> ProfileRow:
    try:
        evicted = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParameterError(f"--from-prefixkv {file} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _none(file, str(error)) from None
    numbers = isinstance(evicted, list) and all(type(x) in (int, float) for x in evicted)
    if not numbers or not evicted:
        raise _none(file, "no list of numbers")
    if len(evicted) != layers:
        raise ParameterError(f"{file} is for {len(evicted)} layers, this model has {layers}")
    if not all(0 <= x < 1 for x in evicted):
        raise _none(file, f"{shown(next(x for x in evicted if not 0 <= x < 1))} is evicted")
    kept = tuple(1.0 - x for x in evicted)
    return ProfileRow(math.fsum(kept) / layers, kept)


def _none(file: Path, reason: str) -> ParameterError:
    return ParameterError(
        f"{file} holds no budgets of PrefixKV's ({' '.join(reason.split())[:200]}); give a file of "
        "its folder confs/: a fraction evicted for each layer"
    )


def _digest(files: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()
