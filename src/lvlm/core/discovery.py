"""Finding families, recipes, ops, targets and backends: every file of a package is one of them."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from lvlm.core.errors import ParameterError, shown


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
    """``attribute`` of every file or folder in ``package`` with one, by the object's ``name``."""
    found: dict[str, Any] = {}
    for module in sorted(m.name for m in _modules(package)):
        thing = getattr(importlib.import_module(f"{package}.{module}"), attribute, None)
        if thing is not None:
            found[thing.name] = thing
    return found


def nearest(
    kind: str, name: str, known: Iterable[str], meant: Mapping[str, str] | None = None
) -> ParameterError:
    """The error for an unknown name: offers what is ``meant`` by it, or the nearest known ones, or
    lists all."""
    known, name = sorted(known), str(name)[:80]
    other = (meant or {}).get(name.lower())
    close = [other] if other in known else difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return ParameterError(f"unknown {kind} {shown(name)}; did you mean {' or '.join(close)}?")
    return ParameterError(f"unknown {kind} {shown(name)}; known: {', '.join(known)}")
