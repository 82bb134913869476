"""A recipe: a token reduction x a cache policy, with parameters of its own.

A recipe is a frozen dataclass whose fields are the parameters that ``--set name=value`` sets. It
composes what it is made of: ``cache_policy`` says as data how the cache is kept short (its graph
code is in parts/cache_rule.py), ``token_reduction`` how the sequence is shortened while the prefill
graph is traced. Both go into the manifest, from which the runtime computes every count. The same
code runs eagerly with the torch references of the ops; that is the recipe's torch reference.

A file of this folder whose ``RECIPE`` is such a class is all that a new recipe needs.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, get_args, get_type_hints

import torch

from lvlm.core.discovery import discover, nearest
from lvlm.core.errors import ParameterError
from lvlm.core.ranges import fraction
from lvlm.export.ports import GraphPort
from lvlm.export.recipes.parts.cache_rule import CacheRule
from lvlm.export.recipes.parts.sequence import TokenSequence
from lvlm.export.standard_ops import Tap
from lvlm.runtime.bundle.manifest import EncoderReduction, Reduction
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.shares import ProfileRow
from lvlm.runtime.reductions import rules


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


class TokenReduction:
    """A shortening of the token sequence while prefill is traced; by itself none."""

    def inputs(self) -> list[GraphPort]:
        """Further inputs of the prefill graph."""
        return []

    def outputs(self) -> list[GraphPort]:
        """Further outputs: what the sequence has as ``outputs`` after the last block."""
        return []

    def reductions(self) -> tuple[Reduction, ...]:
        """Reductions as the runtime must know them to fill those inputs."""
        return ()

    def before_block(
        self, layer: int, state: TokenSequence, tap: Tap | None, inputs: Mapping[str, torch.Tensor]
    ) -> TokenSequence:
        """The sequence that enters block ``layer``; ``tap`` is the block before's attention."""
        del layer, tap, inputs
        return state


@dataclass(frozen=True)
class Recipe:
    """The base of every recipe; on its own it changes nothing."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    # Whether what a layer caches of tokens up to the end of the last image depends on none that
    # follow: an image's entries then serve other questions, too. Only without a cache policy, whose
    # budgets count the whole prompt.
    question_free: ClassVar[bool] = False
    # Settings by which prompts of a few hundred tokens show what it does: for examples and tests.
    small: ClassVar[tuple[str, ...]] = ()

    def for_layers(self, layers: int, deepstack_layers: int = 0) -> Self:
        """The recipe with its defaults worked out and checked for a model of that depth, whose
        first ``deepstack_layers`` blocks need all image tokens (DeepStack)."""
        del layers, deepstack_layers
        return self

    def encoder_reduction(self) -> EncoderReduction | None:
        """The reduction of image tokens before the language model; by itself none."""
        return None

    @property
    def scored(self) -> bool:
        """True where that reduction asks for the tower's scores."""
        reduction = self.encoder_reduction()
        return reduction is not None and rules()[reduction.rule].scored

    @property
    def temporal(self) -> bool:
        """True where that reduction looks at the frame before, of videos."""
        reduction = self.encoder_reduction()
        return reduction is not None and rules()[reduction.rule].temporal

    def token_reduction(self) -> TokenReduction:
        """The token reduction inside the language model; by itself none."""
        return TokenReduction()

    def inputs(self) -> list[GraphPort]:
        """Further inputs of the prefill graph."""
        return self.token_reduction().inputs()

    def outputs(self) -> list[GraphPort]:
        """Further outputs of it."""
        return self.token_reduction().outputs()

    def reductions(self) -> tuple[Reduction, ...]:
        """Reductions as the runtime must know them to fill those inputs."""
        return self.token_reduction().reductions()

    def shortenings(self) -> tuple[EncoderReduction | Reduction, ...]:
        """All that shortens images, in the order in which it does."""
        return (*filter(None, (self.encoder_reduction(),)), *self.reductions())

    def before_block(
        self, layer: int, state: TokenSequence, tap: Tap | None, inputs: Mapping[str, torch.Tensor]
    ) -> TokenSequence:
        """The sequence that enters block ``layer``; ``tap`` is the block before's attention."""
        return self.token_reduction().before_block(layer, state, tap, inputs)

    def cache_policy(self) -> CachePolicy | None:
        """The cache policy; None: every entry stays. Raises ParameterError where the
        parameters are wrong or do not go together."""
        return None

    @property
    def in_place(self) -> bool:
        """True where every token's entry lies at the token's own place in every layer's cache, so
        that what is near a token can be told by slots."""
        return not self.reductions() and self.cache_policy() is None

    def cache_rule(self) -> CacheRule | None:
        """The policy as graph code."""
        policy = self.cache_policy()
        return None if policy is None else CacheRule(policy)

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
    """The fields that are parameters, a recipe's own before those of its bases; others hold what
    was worked out from them."""
    first = {
        name: place
        for place, base in enumerate(recipe.__mro__)
        for name in inspect.get_annotations(base)
    }
    found = [f for f in dataclasses.fields(recipe) if "doc" in f.metadata]
    return sorted(found, key=lambda f: first[f.name])


@dataclass(frozen=True)
class WithCache(Recipe):
    """A recipe with another cache rule in place of its own."""

    recipe: Recipe
    rule: CacheRule | None

    def for_layers(self, layers: int, deepstack_layers: int = 0) -> Self:
        return dataclasses.replace(self, recipe=self.recipe.for_layers(layers, deepstack_layers))

    def encoder_reduction(self) -> EncoderReduction | None:
        return self.recipe.encoder_reduction()

    def token_reduction(self) -> TokenReduction:
        return self.recipe.token_reduction()

    def cache_policy(self) -> CachePolicy | None:
        return None if self.rule is None else self.rule.cache_policy

    def cache_rule(self) -> CacheRule | None:
        return self.rule

    def parameters(self) -> dict[str, Any]:
        return self.recipe.parameters()


def known_recipe(name: str) -> type[Recipe]:
    """A recipe by its name. Raises ParameterError that names the nearest."""
    known: dict[str, type[Recipe]] = discover("lvlm.export.recipes", "RECIPE")
    if name not in known:
        raise nearest("recipe", name, known)
    return known[name]


def cache_recipes() -> dict[str, type[Recipe]]:
    """Every recipe that compresses the cache and leaves the tokens as they are: what merging can
    be combined with."""
    known: dict[str, type[Recipe]] = discover("lvlm.export.recipes", "RECIPE")
    return {name: kind for name, kind in known.items() if caches_only(kind)}


def caches_only(recipe: type[Recipe]) -> bool:
    """True where it has a cache policy and no token reduction."""
    shortens = (
        recipe.token_reduction is not Recipe.token_reduction
        or recipe.encoder_reduction is not Recipe.encoder_reduction
    )
    return not shortens and recipe.cache_policy is not Recipe.cache_policy


def parse_settings(recipe: type[Recipe], settings: Sequence[str]) -> Recipe:
    """A recipe from ``name=value`` strings. Raises ParameterError for what it does not take."""
    parsed = recipe(**read_settings(recipe, settings))
    parsed.cache_policy()  # refuses what does not go together
    return parsed


def read_settings(recipe: type[Recipe], settings: Sequence[str]) -> dict[str, Any]:
    """Values by parameter. They are JSON, or plain words; a parameter that is text takes any word:
    ``positions=true`` is one, though JSON has it, too. ``kv.name=value`` is a setting of the recipe
    that ``kv`` names."""
    known = {f.name for f in settable(recipe)}
    hints = get_type_hints(recipe)
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ParameterError(f"--set {setting}: write name=value")
        if name.startswith("kv.") and "kv_set" in known:
            values["kv_set"] = (*values.get("kv_set", ()), setting.removeprefix("kv."))
            continue
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
        if hints[name] is bool and text.lower() in ("true", "false"):
            value = text.lower() == "true"
        values[name] = tuple(value) if isinstance(value, list) else value
    return values


def _is_text(hint: Any) -> bool:
    """True where a field so annotated holds words: str, str | None or a Literal of them."""
    return hint is str or any(kind is str or isinstance(kind, str) for kind in get_args(hint))


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
    """The name of a file that was read, which a manifest records, not where it lies."""
    return None if path is None else Path(path).name
