"""Sources of the candidates' bundles: exported as they are needed, or given."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from lvlm.calibration.evaluate.recipe_bundles import make, order
from lvlm.calibration.evaluate.variants import Bundle
from lvlm.calibration.tune.candidates import FULL, Candidate, with_room
from lvlm.core.errors import ParameterError
from lvlm.core.progress import Progress

Key = tuple[str, str | None]  # Candidate.bundle


class ServedBundles(NamedTuple):
    """Bundles by what they serve, and why there is none for others."""

    bundles: dict[Key, Bundle]
    refused: dict[Key, str]


class Shelf(Protocol):
    """A source of bundles."""

    def serve(self, some: Sequence[Candidate]) -> ServedBundles:
        """The bundles that ``some`` candidates need. Raises LvlmError."""
        ...

    def command(self, one: Candidate) -> str:
        """The command line that gives the user what was chosen."""
        ...


@dataclass(frozen=True)
class Making:
    """Options that all bundles of a search are exported with (lvlm-export's flags)."""

    model: str
    dtype: str | None
    revision: str | None
    max_text_len: int
    max_images: int
    validate: bool


@dataclass
class ExportedShelf:
    """Exports a bundle for each recipe and cache policy, below ``work``, large enough for ``all``
    candidates. ``lenient``: recipes that are not for this model are left out, else an error."""

    making: Making
    work: Path
    all: Sequence[Candidate]
    lenient: bool
    progress: Progress
    known: dict[Key, Bundle] = field(default_factory=dict)

    def serve(self, some: Sequence[Candidate]) -> ServedBundles:
        refused: dict[Key, str] = {}
        for key in dict.fromkeys(one.bundle for one in some):
            if key in self.known:
                continue
            recipe = with_room([one for one in self.all if one.bundle == key]).made()
            how = self.making
            try:
                orders = order(
                    [recipe],
                    self.work,
                    model=how.model,
                    dtype=how.dtype,
                    revision=how.revision,
                    max_text_len=how.max_text_len,
                    max_images=how.max_images,
                    validate=how.validate,
                )
                self.progress.stages += sum(not wanted.is_there for wanted in orders)
                (self.known[key],) = make(orders, self.progress)
            except ParameterError as error:
                if not self.lenient or key == FULL.bundle:
                    raise
                refused[key] = str(error)
        return ServedBundles(dict(self.known), refused)

    def command(self, one: Candidate) -> str:
        how = self.making
        words = ["lvlm-export", "-m", how.model, "-r", one.recipe]
        words += [word for setting in one.settings for word in ("--set", setting)]
        words += ["--dtype", how.dtype] if how.dtype else []
        words += ["--revision", how.revision] if how.revision else []
        words += ["--max-text-len", str(how.max_text_len), "--max-images", str(how.max_images)]
        return shlex.join([*words, "-o", "out"])


@dataclass
class GivenShelf:
    """Bundles that are there."""

    bundles: Mapping[Key, Bundle]

    def serve(self, some: Sequence[Candidate]) -> ServedBundles:
        del some
        return ServedBundles(dict(self.bundles), {})

    def command(self, one: Candidate) -> str:
        fractions = {"--keep": one.keep, "--kv-keep": one.kv_keep}
        words = [
            word for flag, x in fractions.items() if x is not None for word in (flag, f"{x:g}")
        ]
        return shlex.join(["lvlm-run", str(self.bundles[one.bundle].folder), *words])


def given_shelf(bundles: Sequence[Bundle]) -> GivenShelf:
    """Those of one model, one of them of recipe none. Raises ParameterError."""
    found: dict[Key, Bundle] = {}
    for bundle in bundles:
        manifest = bundle.manifest
        kv = manifest.parameters.get("kv") if manifest.shortenings else None
        key = FULL.bundle if bundle.is_full else (manifest.recipe, kv)
        if key in found:
            raise ParameterError(
                f"{bundle.label} is of the same recipe as {found[key].label}; leave one out"
            )
        if manifest.text != bundles[0].manifest.text:
            raise ParameterError(f"{bundle.label} is not the model that {bundles[0].label} is")
        found[key] = bundle
    if FULL.bundle not in found:
        raise ParameterError("a bundle of recipe none must be among them: it is what others lose")
    return GivenShelf(found)


def given_candidates(
    shelf: GivenShelf, keeps: Sequence[float], kv_keeps: Sequence[float]
) -> list[Candidate]:
    """Every bundle at every fraction that is not above its own, or as it was exported."""
    found = [FULL]
    for (recipe, kv), bundle in shelf.bundles.items():
        if (recipe, kv) == FULL.bundle:
            continue
        manifest, policy = bundle.manifest, bundle.manifest.cache_policy
        free = manifest.shortenings and all(r.ratio is None for r in manifest.shortenings)
        own: Sequence[float | None] = [None]
        if free:
            own = [k for k in keeps if k <= manifest.keep] or [manifest.keep]
        entries: Sequence[float | None] = [None]
        if policy is not None:
            entries = [g for g in kv_keeps if g <= policy.budget.keep] or [policy.budget.keep]
        found += [Candidate(recipe, kv, k, g) for k in own for g in entries]
    return found
