"""Candidates of a choice: recipes, cache policies with them, and the fractions that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lvlm.calibration.evaluate.recipe_bundles import settings_of
from lvlm.core.errors import ParameterError
from lvlm.export.recipes.recipe import (
    Recipe,
    cache_recipes,
    known_recipe,
    parse_settings,
    read_settings,
    settable,
)

OWN_CACHE = "interval"  # lightvlm's own, which is no recipe by itself


@dataclass(frozen=True)
class Candidate:
    """One setting to try. ``kv``: the cache policy of a recipe that shortens images; None: that is
    no such recipe. The fractions are None where nothing has them. ``fixed``: further settings,
    which no other candidate of the same recipe and policy has otherwise."""

    recipe: str
    kv: str | None = None
    keep: float | None = None
    kv_keep: float | None = None
    fixed: tuple[str, ...] = ()

    @property
    def bundle(self) -> tuple[str, str | None]:
        """The key of the bundle that serves it: fractions are options of a call."""
        return self.recipe, self.kv

    @property
    def label(self) -> str:
        words = [self.recipe]
        if self.keep is not None:
            words.append(f"keep {self.keep:g}")
        if self.kv not in (None, "none"):
            words.append(f"+ {self.kv}")
        if self.kv_keep is not None:
            words.append(f"kv-keep {self.kv_keep:g}")
        return " ".join(words)

    @property
    def settings(self) -> list[str]:
        """The settings as ``--set`` takes them."""
        given = {"keep": self.keep, "kv": self.kv, "kv_keep": self.kv_keep}
        own = [
            f"{name}={value if isinstance(value, str) else format(value, 'g')}"
            for name, value in given.items()
            if value is not None
        ]
        return [*own, *self.fixed]

    def made(self) -> Recipe:
        """The recipe itself. Raises ParameterError."""
        return parse_settings(known_recipe(self.recipe), self.settings)


FULL = Candidate("none")


TRIED = ("keep", "kv", "kv_keep")  # parameters that candidates differ in


def candidates(
    names: Sequence[str],
    keeps: Sequence[float],
    kv_keeps: Sequence[float],
    settings: Sequence[str] = (),
) -> list[Candidate]:
    """``none``, and every recipe of ``names`` at every fraction: those that shorten images alone
    and with each that compresses the cache, and the latter alone. ``settings``: ``name=value`` or
    ``recipe.name=value``, for all candidates that have it.

    Raises ParameterError for a name that is neither.
    """
    caches = [n for n in names if n == OWN_CACHE or n in cache_recipes()]
    shortening = [n for n in names if n not in (*caches, FULL.recipe)]
    for name in shortening:
        if "keep" not in {field.name for field in settable(known_recipe(name))}:
            raise ParameterError(f"recipe {name} has no keep to try; leave it out of --recipes")
    if OWN_CACHE in names and not shortening:
        raise ParameterError(
            f"{OWN_CACHE} compresses the cache of recipes that shorten images; add one of these"
        )
    found = [FULL]
    found += [Candidate(n, "none", keep=k) for n in shortening for k in keeps]
    found += [Candidate(n, kv_keep=g) for n in caches if n != OWN_CACHE for g in kv_keeps]
    found += [
        Candidate(n, kv, keep=k, kv_keep=g)
        for n in shortening
        for kv in caches
        for k in keeps
        for g in kv_keeps
    ]
    fixed = settings_of([n for n in (*shortening, *caches) if n != OWN_CACHE], settings)
    for name, own in fixed.items():
        _check(name, own)
    found = [replace(one, fixed=_fixed(one, fixed)) for one in found]
    _check_used(fixed, found)
    for one in found:
        one.made()  # whatever is wrong with the fractions is said now
    return found


def _fixed(one: Candidate, settings: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The ``settings`` that a candidate has: its recipe's, those of a cache
    of its own where it has that, and its policy's."""
    own = settings.get(one.recipe, ())
    if one.kv not in (None, OWN_CACHE):
        own = [setting for setting in own if not setting.startswith(("kv_", "kv."))]
    policy = settings.get(one.kv or "", ())
    return (*own, *(f"kv.{setting}" for setting in policy))


def _check(recipe: str, settings: Sequence[str]) -> None:
    """Raise ParameterError for a setting that a recipe does not know or that candidates try."""
    for name in read_settings(known_recipe(recipe), settings):
        if name in TRIED:
            raise ParameterError(
                f"--set {recipe}.{name} is what candidates differ in; give its values by "
                f"--{'recipes' if name == 'kv' else name.replace('_', '-')}"
            )


def _check_used(settings: Mapping[str, Sequence[str]], found: Sequence[Candidate]) -> None:
    """Raise ParameterError for a setting that none of the candidates has."""
    for recipe, own in settings.items():
        having = [one for one in found if recipe in (one.recipe, one.kv)]
        used = {setting.removeprefix("kv.") for one in having for setting in one.fixed}
        for setting in own:
            if setting.removeprefix("kv.") not in used:
                raise ParameterError(
                    f"--set {recipe}.{setting} is for its own way with the cache, which no "
                    f"candidate has; add {OWN_CACHE} to --recipes"
                )


def with_room(some: Sequence[Candidate]) -> Candidate:
    """Settings of the bundle for ``some`` candidates: calls can only lower fractions."""

    def largest(values: Sequence[float | None]) -> float | None:
        return max((v for v in values if v is not None), default=None)

    return replace(
        some[0],
        keep=largest([one.keep for one in some]),
        kv_keep=largest([one.kv_keep for one in some]),
    )
