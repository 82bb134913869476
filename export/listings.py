"""Lists of what there is to choose from: recipes with their parameters, families, targets.

To be called within ``stand_ins``: nothing here needs torch. Lines fit a terminal of 80 columns.
"""

from __future__ import annotations

import json

from lvlm.core.discovery import discover, nearest
from lvlm.core.wrapping import wrapped
from lvlm.export.checkpoint.checkpoint import SHIPPED
from lvlm.export.dtypes import DTYPES
from lvlm.export.families.family import Family
from lvlm.export.recipes.recipe import Recipe, settable
from lvlm.export.targets.target import Target


def recipes() -> str:
    known: dict[str, type[Recipe]] = discover("lvlm.export.recipes", "RECIPE")
    width = max(map(len, known))
    lines = ["recipes (--help-recipe NAME lists one's parameters):"]
    for name, kind in sorted(known.items()):
        lines.append(wrapped(f"  {name:{width}}  ", kind.summary))
        if kind.source != "-":
            lines.append(wrapped(" " * (width + 4), f"[{kind.source}]"))
    return "\n".join(lines)


def recipe(name: str) -> str:
    known: dict[str, type[Recipe]] = discover("lvlm.export.recipes", "RECIPE")
    if name not in known:
        raise nearest("recipe", name, known)
    chosen = known[name]
    lines = [wrapped(f"{name}: ", chosen.summary), f"source: {chosen.source}"]
    for field in settable(chosen):
        lines.append(f"  --set {field.name}={_show(field.default)}")
        lines.append(wrapped("        ", field.metadata["doc"]))
    if not settable(chosen):
        lines.append("no parameters")
    return "\n".join(lines)


def _show(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def models() -> str:
    """Each family, what it takes and its models, as the families themselves say."""
    known: dict[str, Family] = discover("lvlm.export.families", "FAMILY")
    shipped = dict.fromkeys(SHIPPED, "shipped with this package, trained")
    lines = ["models (or any local folder or hub id of these families):"]
    for name, family in sorted(known.items()):
        aliases = (shipped if name == "llava" else {}) | dict(family.aliases)
        width = max(map(len, aliases))
        lines += ["", f"{name}", wrapped("  an image becomes: ", family.image_handling)]
        lines.append(wrapped("  video: ", family.video or "no"))
        lines += [f"  {alias:{width}}  {hub_id}" for alias, hub_id in aliases.items()]
    recipes: dict[str, type[Recipe]] = discover("lvlm.export.recipes", "RECIPE")
    return "\n".join(
        [
            *lines,
            "",
            wrapped(
                "",
                "Every family: several images in a prompt (--max-images), recipes "
                f"{', '.join(sorted(recipes))}, --dtype {', '.join(DTYPES)}. What a model has no "
                "use for is refused by name before any work.",
            ),
            wrapped(
                "",
                "Tested on small models with random weights, token for token against "
                "transformers. The weights on the hub were not run; the export compares them "
                "with transformers when you do.",
            ),
        ]
    )


def targets() -> str:
    known: dict[str, Target] = discover("lvlm.export.targets", "TARGET")
    width = max(map(len, known))
    rows = (wrapped(f"  {name:{width}}  ", t.summary) for name, t in sorted(known.items()))
    return "\n".join(rows)
