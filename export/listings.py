"""What is there to choose from: recipes with their parameters, families, targets."""

from __future__ import annotations

from lvlm.export.checkpoint import SHIPPED
from lvlm.export.families._base import Family
from lvlm.export.recipes._base import Recipe, settable
from lvlm.export.targets._base import Target
from lvlm.runtime.discovery import discover, nearest


def recipes() -> str:
    known: dict[str, type[Recipe]] = discover("lvlm.export.recipes", "RECIPE")
    lines = [f"  {name:12} {r.summary} [{r.source}]" for name, r in sorted(known.items())]
    return "\n".join(["recipes (--help-recipe NAME lists one's parameters):", *lines])


def recipe(name: str) -> str:
    known: dict[str, type[Recipe]] = discover("lvlm.export.recipes", "RECIPE")
    if name not in known:
        raise nearest("recipe", name, known)
    chosen = known[name]
    lines = [f"{name}: {chosen.summary}", f"source: {chosen.source}"]
    for field in settable(chosen):
        lines.append(f"  --set {field.name}={_show(field.default)}")
        lines.append(f"        {field.metadata['doc']}")
    if not settable(chosen):
        lines.append("no parameters")
    return "\n".join(lines)


def _show(value: object) -> str:
    return "null" if value is None else str(value)


def models() -> str:
    families: dict[str, Family] = discover("lvlm.export.families", "FAMILY")
    lines = [f"  {alias:12} shipped with this package" for alias in SHIPPED]
    for name, family in sorted(families.items()):
        lines += [
            f"  {alias:12} {hub_id} (family {name})" for alias, hub_id in family.aliases.items()
        ]
    return "\n".join(["models (or any local folder or hub id of these families):", *lines])


def targets() -> str:
    known: dict[str, Target] = discover("lvlm.export.targets", "TARGET")
    width = max(map(len, known))
    return "\n".join(f"  {name:{width}} {t.summary}" for name, t in sorted(known.items()))
