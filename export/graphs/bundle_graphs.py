"""The graphs of a bundle, from a family's parts and a recipe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lvlm.export.graphs.compact import Compact
from lvlm.export.graphs.decode import Decode
from lvlm.export.graphs.extend import Extend
from lvlm.export.graphs.extend_kept import ExtendKept
from lvlm.export.graphs.graph import BundleGraph
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.prefill import Prefill
from lvlm.export.graphs.skeleton import Skeleton
from lvlm.export.graphs.vision import Vision
from lvlm.export.ports import GraphPort
from lvlm.export.recipes.recipe import Recipe


def graph_names(
    recipe: Recipe, language: LanguageModel, *, sessions: bool = False
) -> tuple[str, ...]:
    """The graphs of a bundle with this recipe. ``sessions``: conversations keep their cache,
    whatever the recipe."""
    extends, compacts = _extends(recipe, language, sessions), _compacts(recipe)
    return (
        *(Vision.name, Prefill.name),
        *((Extend.name,) if extends else ()),
        Decode.name,
        *((Compact.name,) if compacts else ()),
    )


def bundle_graphs(
    skeleton: Skeleton,
    recipe: Recipe,
    arrays: Sequence[GraphPort],
    cache_dtype: torch.dtype,
    *,
    sessions: bool = False,
) -> list[BundleGraph]:
    """Those graphs; image features are of the weights' dtype.

    Args:
        arrays: what the vision graph takes, as the family declares it.
    """
    language, dtype, rule = skeleton.language, skeleton.dtype, recipe.cache_rule()
    scores = score_width(skeleton.vision) if recipe.scored else 0
    graphs: list[BundleGraph] = [
        Vision(skeleton.vision, arrays, language.feature_width, dtype, scores),
        Prefill(language, recipe, dtype, cache_dtype),
    ]
    if _extends(recipe, language, sessions):
        if recipe.in_place:
            graphs.append(Extend(language, dtype, cache_dtype))
        else:
            graphs.append(ExtendKept(language, rule, dtype, cache_dtype))
    graphs.append(Decode(language, rule, cache_dtype))
    if rule is not None and _compacts(recipe):
        graphs.append(Compact(language, rule, cache_dtype))
    return graphs


def score_width(tower: nn.Module) -> int:
    """Numbers of each token's that a family's tower gives besides its features; 0: none."""
    return int(getattr(tower, "score_width", 0))


def _extends(recipe: Recipe, language: LanguageModel, sessions: bool) -> bool:
    """True where tokens are read behind entries that are there: these must not have seen them."""
    wanted = recipe.in_place or sessions or recipe.question_free
    return wanted and language.bidirectional != "prompt"


def _compacts(recipe: Recipe) -> bool:
    """True where the cache is compacted between decode steps."""
    rule = recipe.cache_rule()
    return rule is not None and rule.cache_policy.interval is not None
