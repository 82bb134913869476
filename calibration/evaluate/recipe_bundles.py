"""Bundles that an evaluation makes for itself: one per recipe, kept between runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm.calibration.evaluate.records import ResultsError, key_of
from lvlm.calibration.evaluate.variants import Bundle
from lvlm.core.discovery import nearest
from lvlm.core.errors import ParameterError
from lvlm.core.integrity import sha256_of
from lvlm.core.progress import Progress
from lvlm.export import export_plan
from lvlm.export.budgets.prefix_profiles import model_hash
from lvlm.export.checkpoint import checkpoint as checkpoints
from lvlm.export.export_options import ExportOptions
from lvlm.export.exporter import export
from lvlm.export.recipes.recipe import Recipe, known_recipe, parse_settings, settable
from lvlm.runtime.bundle.manifest import MANIFEST, SCHEMA


@dataclass(frozen=True)
class Order:
    """A bundle to make: where, and how."""

    label: str
    options: ExportOptions

    @property
    def folder(self) -> Path:
        return self.options.output

    @property
    def is_there(self) -> bool:
        return (self.folder / MANIFEST).is_file()


def parse_recipes(
    names: Sequence[str], settings: Sequence[str], keeps: Sequence[float], kv_keeps: Sequence[float]
) -> list[Recipe]:
    """The recipes with their settings, and with room for the largest fraction asked for.

    A setting ``recipe.name=value`` is for one recipe, ``name=value`` for all that have it. Raises
    ParameterError.
    """
    given = settings_of(names, settings)
    return [
        parse_settings(kind, [*given[kind.name], *_room(kind, given[kind.name], keeps, kv_keeps)])
        for kind in map(known_recipe, names)
    ]


def settings_of(names: Sequence[str], settings: Sequence[str]) -> dict[str, list[str]]:
    """The settings ``name=value`` that are for each recipe. Raises ParameterError."""
    chosen = [known_recipe(name) for name in names]
    given: dict[str, list[str]] = {name: [] for name in names}
    for setting in settings:
        for name in _meant(setting, chosen):
            given[name].append(setting.removeprefix(f"{name}."))
    return given


def _meant(setting: str, chosen: Sequence[type[Recipe]]) -> list[str]:
    """The names of the recipes that a setting is for."""
    have = {kind.name: {f.name for f in settable(kind)} for kind in chosen}
    head, equals, _ = setting.partition("=")
    if not equals:
        raise ParameterError(f"--set {setting}: write name=value, or recipe.name=value")
    recipe, dot, _ = head.rpartition(".")
    if dot:
        if recipe not in have:
            raise nearest(f"recipe in --set {setting}", recipe, have)
        return [recipe]  # whose own parser knows what it takes
    meant = [name for name, parameters in have.items() if head in parameters]
    if not meant and not any(have.values()):
        raise ParameterError(f"--set {setting}: none of the recipes has parameters")
    if not meant:
        raise nearest("parameter", head, set().union(*have.values()))
    return meant


def _room(
    kind: type[Recipe], given: Sequence[str], keeps: Sequence[float], kv_keeps: Sequence[float]
) -> list[str]:
    """Settings that make a bundle large enough for every fraction: calls can only lower them."""
    parameters = {f.name for f in settable(kind)}
    fixed = {setting.partition("=")[0] for setting in given}
    wanted: dict[str, float] = {}
    if "keep" in parameters and (keeps or kv_keeps):
        wanted["keep"] = 1.0
        wanted["kv_keep"] = 1.0 if keeps else max(kv_keeps)
    elif "kv_keep" in parameters and keeps:
        wanted["kv_keep"] = max(keeps)
    for name in wanted:
        if name in fixed:
            raise ParameterError(
                f"--set {kind.name}.{name} and --keep or --kv-keep exclude one another; leave "
                "one out"
            )
    if wanted and "schedule" in fixed:
        raise ParameterError("--keep and --kv-keep cannot change a schedule; leave one out")
    if fixed & {"profile", "kv_profile"}:
        wanted.pop("kv_keep", None)  # a profile brings its own
    return [f"{name}={value}" for name, value in wanted.items() if name in parameters]


def order(
    recipes: Sequence[Recipe],
    work: Path,
    *,
    model: str,
    dtype: str | None,
    revision: str | None,
    max_text_len: int,
    max_images: int,
    validate: bool,
) -> list[Order]:
    """A folder below ``work`` for each recipe, named by everything the bundle depends on.

    Raises CheckpointError if there is no such model, ParameterError.
    """
    checkpoint = checkpoints.resolve(model, revision)
    weights = model_hash(checkpoint)
    orders = []
    for recipe in recipes:
        parts: dict[str, Any] = {
            "schema": SCHEMA,
            "weights": weights,
            "recipe": {k: _content(v) for k, v in recipe.parameters().items()},
            "options": [dtype, max_text_len, max_images],
        }
        options = ExportOptions(
            model=model,
            recipe=recipe,
            output=work / f"{recipe.name}-{key_of(**parts)[:8]}",
            dtype=dtype,
            revision=revision,
            max_text_len=max_text_len,
            max_images=max_images,
            validate=validate,
        )
        orders.append(Order(recipe.name, options))
    return orders


def _content(value: Any) -> Any:
    """A parameter as JSON; a file stands for what is in it."""
    if isinstance(value, str) and Path(value).is_file():
        return sha256_of(Path(value))
    return json.loads(json.dumps(value))


def make(orders: Sequence[Order], progress: Progress) -> list[Bundle]:
    """The bundles, exported where they are not there yet. Raises LvlmError."""
    for wanted in orders:
        if wanted.is_there:
            continue
        with progress.stage(f"export recipe {wanted.label}") as stage:
            try:
                wanted.folder.parent.mkdir(exist_ok=True)
            except OSError as error:
                reason = error.strerror or error
                raise ResultsError(f"{wanted.folder} cannot be made: {reason}") from None
            plan = export_plan.make_plan(wanted.options)
            export(plan, Progress(0, quiet=True))
            stage.result = wanted.folder.name
    return [Bundle.read(wanted.folder, wanted.label) for wanted in orders]
