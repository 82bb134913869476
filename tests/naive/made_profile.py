"""A profile file whose shares are made up: no two layers keep the same, in no order of depth."""

from __future__ import annotations

from pathlib import Path

from lvlm.export.budgets.prefix_profiles import (
    DataId,
    LayerSpread,
    PrefixProfile,
    RecipeId,
    identify,
)
from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.runtime.policies.shares import ProfileRow

KEEPS = (0.2, 0.5, 0.8, 1.0)


def write_profile(path: Path, checkpoint: Path, layers: int, keep: float) -> Path:
    """Write one for a checkpoint, made for ``keep`` of ``KEEPS``; always the same bytes."""
    rows = tuple(ProfileRow(each, _shares(each, layers)) for each in KEEPS)
    profile = PrefixProfile(
        kind="prefixkv",
        schema=1,
        keep=keep,
        rows=rows,
        spread=LayerSpread((0.0,) * layers, (rows[KEEPS.index(keep)].fractions,)),
        layers=layers,
        model=identify(Checkpoint(checkpoint, str(checkpoint), None)),
        data=DataId("", 1),
        recipe=RecipeId("none", {}),
        tools={},
    )
    path.parent.mkdir(exist_ok=True)
    profile.write(path)
    return path


def _shares(keep: float, layers: int) -> tuple[float, ...]:
    """In (0, 1] with mean ``keep``: as far from it as four fifths of the nearer end."""
    middle = (layers - 1) / 2
    reach = 0.8 * min(keep, 1 - keep)
    # Every other layer from the end, then the rest: 3 1 0 2 of four
    order = [*range(layers - 1, -1, -2), *range(layers - 2, -1, -2)[::-1]]
    return tuple(keep + reach * (place - middle) / middle for place in order)
