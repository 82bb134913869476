"""Write the tables of recipes in README.md and docs/recipes.md from what the recipes say of
themselves. Run it after a recipe was added or changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lvlm.core.discovery import discover
from lvlm.export.stand_ins import stand_ins

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs/recipes.md")
LAYERS = 28  # of the model whose defaults are shown


def recipes() -> str:
    """Table of what every recipe does, ``none`` first."""
    known = sorted(_known().values(), key=lambda kind: (kind.name != "none", kind.name))
    rows = [(f"`{kind.name}`", kind.summary, kind.source) for kind in known]
    return _table(("recipe", "what it does", "source"), rows)


def names() -> str:
    """Their names in one line."""
    return f"Recipes: {', '.join(f'`{name}`' for name in sorted(_known()))}.\n"


def policies() -> str:
    """Table of what the cache policies are composed of, with their defaults."""
    rows = []
    for name, kind in sorted(_known().items()):
        policy = kind().for_layers(LAYERS).cache_policy()
        if policy is not None:
            parts = (policy.score, policy.select, policy.decode, policy.budget)
            rows.append((f"`{name}`", *map(_said, parts)))
    return _table(("recipe", "score", "select", "decode", "budget"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "names": names,
    "recipes": recipes,
    "policies": policies,
}


def rewritten(page: Path) -> str:
    """A page with the present tables."""
    text = page.read_text()
    for name, table in TABLES.items():
        begin = f"<!-- {name}: written by scripts/recipe_tables.py -->\n"
        end = f"<!-- end of {name} -->\n"
        before, found, rest = text.partition(begin)
        if found:
            with stand_ins():
                text = before + begin + table() + end + rest.partition(end)[2]
    return text


def _known() -> dict[str, Any]:
    return discover("lvlm.export.recipes", "RECIPE")


def _said(part: Any) -> str:
    """A part's kind, and its own numbers where they say something."""
    fields = [f for f in dataclasses.fields(part) if f.name != "keep"]
    values = {f.name: getattr(part, f.name) for f in fields if getattr(part, f.name) != f.default}
    said = [name if value is True else f"{name} {value}" for name, value in values.items()]
    return f"{part.kind} ({', '.join(said)})" if said else str(part.kind)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rewritten(page))
