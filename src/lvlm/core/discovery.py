"""Finding families, recipes, ops, targets and backends: every file of a package is one of them.

Packages of other authors add theirs by entry points, in the groups below.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lvlm.core.errors import ParameterError, shown

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

# Package of this project -> group of entry points that adds to it. An entry point names a module
# that looks like a file of the package, or what such a file would call RECIPE, FAMILY, …
GROUPS = {
    "lvlm.export.recipes": "lvlm.recipes",
    "lvlm.export.families": "lvlm.families",
    "lvlm.export.targets": "lvlm.targets",
    "lvlm.runtime.backends": "lvlm.backends",
    "lvlm.runtime.processors": "lvlm.processors",
    "lvlm.runtime.reductions": "lvlm.reductions",
}


def names(package: str) -> list[str]:
    """Names of the files in ``package``, without importing them; folders in it hold what its files
    share."""
    return sorted(m.name for m in _modules(package) if not m.ispkg)


def _modules(package: str) -> list[pkgutil.ModuleInfo]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    return list(pkgutil.iter_modules(spec.submodule_search_locations))


@cache
def discover(package: str, attribute: str) -> dict[str, Any]:
    """``attribute`` of every file or folder in ``package`` with one, by the object's ``name``; of
    entry points, too."""
    found: dict[str, Any] = {}
    for module in sorted(m.name for m in _modules(package)):
        thing = getattr(importlib.import_module(f"{package}.{module}"), attribute, None)
        if thing is not None:
            found[thing.name] = thing
    for point in added(package).values():
        thing = loaded(point)
        thing = getattr(thing, attribute, None) if isinstance(thing, ModuleType) else thing
        name = getattr(thing, "name", None)
        if not isinstance(name, str):
            raise ParameterError(f"{_about(point)} has no {attribute}; update or uninstall it")
        if name in found:
            raise ParameterError(
                f"{_about(point)} has the name {shown(name)}, which is taken; uninstall it"
            )
        found[name] = thing
    return found


@cache
def added(package: str) -> dict[str, EntryPoint]:
    """Additions of installed packages to ``package``, by the entry points' names."""
    if package not in GROUPS:
        return {}
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=GROUPS[package])}


def loaded(point: EntryPoint) -> Any:
    """The object that an entry point names. Raises ParameterError if it cannot be imported."""
    try:
        return point.load()
    except Exception as error:  # code of others
        reason = str(error).partition("\n")[0]
        raise ParameterError(
            f"{_about(point)} cannot be loaded ({reason}); update or uninstall it"
        ) from error


def _about(point: EntryPoint) -> str:
    owner = f" of {point.dist.name}" if point.dist is not None else ""
    return f"{point.name}{owner} (entry point of {point.group})"


LISTED = 24  # known names that an error lists


def nearest(
    kind: str, name: str, known: Iterable[str], meant: Mapping[str, str] | None = None
) -> ParameterError:
    """The error for an unknown name: offers what is ``meant`` by it, or the nearest known ones, or
    lists all, or of many the first."""
    known, name = sorted(known), str(name)[:80]
    other = (meant or {}).get(name.lower())
    close = [other] if other in known else difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return ParameterError(f"unknown {kind} {shown(name)}; did you mean {' or '.join(close)}?")
    more = f", … ({len(known)} in all)" if len(known) > LISTED else ""
    return ParameterError(f"unknown {kind} {shown(name)}; known: {', '.join(known[:LISTED])}{more}")
