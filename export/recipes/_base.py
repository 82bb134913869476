"""What a recipe is: a frozen dataclass whose fields are the parameters ``--set name=value`` sets.

A recipe acts while the prefill graph is traced: before each block it may shorten the sequence. It
also says, as data in the manifest, which counts the runtime must compute from the prompt. The same
code runs eagerly with the torch references of the ops; that is the recipe's torch reference.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, get_args, get_type_hints

import torch

from lvlm.core.discovery import nearest
from lvlm.core.errors import ParameterError
from lvlm.export.recipes._cache import CacheRule
from lvlm.export.recipes._sequence import GraphInput, TokenSequence
from lvlm.export.standard_ops import Tap
from lvlm.runtime.bundle.manifest import ProfileRow, Reduction


@dataclass(frozen=True)
class Calibration:
    """A PrefixKV profile that a recipe needs: read from ``file``, or measured at ``keep`` on
    ``samples`` (a jsonl file), or on the built-in ones."""

    keep: float
    file: str | None = None
    samples: str | None = None


def parameter(default: Any, doc: str) -> Any:
    """A recipe's field with the line that ``--help-recipe`` shows."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Recipe:
    """The base of every recipe; on its own it changes nothing."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]

    def for_layers(self, layers: int, deep: int = 0) -> Self:
        """The recipe with its defaults worked out and checked for a model of that depth, whose
        first ``deep`` blocks need all image tokens (DeepStack)."""
        del layers, deep
        return self

    def inputs(self) -> list[GraphInput]:
        """Further inputs of the prefill graph."""
        return []

    def reductions(self) -> tuple[Reduction, ...]:
        """What the runtime must know to fill those inputs."""
        return ()

    def before_block(
        self, layer: int, state: TokenSequence, tap: Tap | None, inputs: Mapping[str, torch.Tensor]
    ) -> TokenSequence:
        """The sequence that enters block ``layer``; ``tap`` is the block before's attention."""
        del layer, tap, inputs
        return state

    def cache_rule(self) -> CacheRule | None:
        """How the cache is compressed; None: every entry stays."""
        return None

    def calibration(self) -> Calibration | None:
        """The profile that is still to be found; None: the recipe needs none, or has it."""
        return None

    def with_profile(self, keep: float, rows: tuple[ProfileRow, ...]) -> Self:
        """The recipe with the profile that ``calibration`` asked for."""
        del keep, rows
        raise ParameterError(f"recipe '{self.name}' takes no profile")

    def parameters(self) -> dict[str, Any]:
        """Every parameter and its value, as the manifest records them."""
        return {f.name: getattr(self, f.name) for f in settable(type(self))}


def settable(recipe: type[Recipe]) -> list[dataclasses.Field[Any]]:
    """The fields that are parameters; others hold what was worked out from them."""
    return [f for f in dataclasses.fields(recipe) if "doc" in f.metadata]


def parse_settings(recipe: type[Recipe], settings: Sequence[str]) -> Recipe:
    """A recipe from ``name=value`` strings; values are JSON, or plain words; a parameter that is
    text takes any word: ``positions=true`` is one, though JSON has it, too."""
    known = {f.name for f in settable(recipe)}
    hints = get_type_hints(recipe)
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ParameterError(f"--set {setting}: write name=value")
        if name not in known:
            if not known:
                raise ParameterError(f"--set {setting}: recipe '{recipe.name}' has no parameters")
            raise nearest(f"parameter of recipe '{recipe.name}'", name, known)
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if not isinstance(value, str) and _is_text(hints[name]):
            value = text
        values[name] = tuple(value) if isinstance(value, list) else value
    return recipe(**values)


def _is_text(hint: Any) -> bool:
    """Whether a field so annotated holds words: str, str | None or a Literal of them."""
    return hint is str or any(kind is str or isinstance(kind, str) for kind in get_args(hint))


def fraction(name: str, value: Any) -> None:
    """ParameterError unless ``value`` is a number in (0, 1]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 < value <= 1:
        raise ParameterError(f"{name} is {value!r}; give a number above 0 and up to 1")


def whole(name: str, value: Any, least: int) -> None:
    """ParameterError unless ``value`` is a whole number of ``least`` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ParameterError(f"{name} is {value!r}; give a whole number of {least} or more")


def choice(name: str, value: Any, literal: Any) -> None:
    """ParameterError unless ``value`` is one of the Literal's."""
    if value not in get_args(literal):
        raise nearest(f"value of {name}", str(value), get_args(literal))


def no_profile_and_keep(name: str, profile: str | None, kv_keep: float | None) -> None:
    """ParameterError if both are given: a profile has its own kv_keep."""
    if profile is not None and kv_keep is not None:
        raise ParameterError(f"{name} and kv_keep are both given; the profile has its own kv_keep")
    if kv_keep is not None:
        fraction("kv_keep", kv_keep)


def file_name(path: str | None) -> str | None:
    """What a manifest records of a file that was read: its name, not where it lies."""
    return None if path is None else Path(path).name
