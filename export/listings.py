"""What is there to choose from: recipes with their parameters, families, targets."""

from __future__ import annotations

from collections.abc import Sequence

from lvlm.export.checkpoint import SHIPPED
from lvlm.export.cli import DTYPES
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
    """What each family takes, and which of its configurations the tests compare: all of it said by
    the families themselves."""
    known: dict[str, Family] = discover("lvlm.export.families", "FAMILY")
    families = sorted(known.items())
    ids = [("llava", alias, "shipped with this package, trained") for alias in SHIPPED]
    ids += [(name, alias, hub_id) for name, f in families for alias, hub_id in f.aliases.items()]
    takes = [
        (name, f.pictures, f.video or "no", ", ".join(c for c, _ in f.tiny_configs()))
        for name, f in families
    ]
    recipes: dict[str, type[Recipe]] = discover("lvlm.export.recipes", "RECIPE")
    return "\n".join(
        [
            "models (or any local folder or hub id of these families):",
            *_columns([("family", "alias", "hub id"), *ids]),
            "",
            *_columns([("family", "a picture becomes", "video", "tested on"), *takes]),
            "",
            "Every family: several pictures in a prompt (--max-images), "
            f"recipes {', '.join(sorted(recipes))}, --dtype {', '.join(DTYPES)}.",
            "Tested on: small models of these configurations with random weights, token for token "
            "against transformers.",
            "The weights on the hub were not run; the export compares them with transformers when "
            "you do.",
        ]
    )


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(f"{x:{w}}" for x, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def targets() -> str:
    known: dict[str, Target] = discover("lvlm.export.targets", "TARGET")
    width = max(map(len, known))
    return "\n".join(f"  {name:{width}} {t.summary}" for name, t in sorted(known.items()))
