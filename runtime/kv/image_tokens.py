"""Counts of image tokens per block, computed on the host before a call, from the manifest alone.

No shape in a graph depends on data: for every reduction the host computes the counts per image
and gives lengths as the extents of index inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from lvlm.core.errors import ParameterError
from lvlm.core.ranges import fraction
from lvlm.core.rounding import rounded
from lvlm.runtime.bundle.manifest import EncoderReduction, Reduction
from lvlm.runtime.options.generation_options import Keep
from lvlm.runtime.reductions import rules

Shortening = EncoderReduction | Reduction
ASKING = 64  # of the text after an image so many may score it: their attention is held as a whole


def keep_ratios(
    reductions: Sequence[Shortening], exported: float, keep: Keep | None
) -> tuple[float, ...]:
    """Fraction of the original tokens left after each reduction.

    ``keep`` None: as exported; a number: the final fraction; a list: one fraction per reduction.
    """
    if keep is not None and not reductions:
        if keep == 1.0:
            return ()
        raise ParameterError(
            f"keep={keep} needs a bundle with fewer image tokens; export with a recipe that "
            "merges or drops some (lvlm-export --help-recipe lists them)"
        )
    if keep is None or isinstance(keep, Real):
        fixed = [r.ratio for r in reductions if r.ratio is not None]
        if keep is None and fixed:
            return tuple(fixed)
        if fixed:
            raise ParameterError(
                f"this bundle has its own schedule {fixed}: give keep as a list of "
                f"{len(reductions)} fractions"
            )
        final = fraction("keep", exported if keep is None else keep)
        return tuple(final ** (r.exponent or 1.0) for r in reductions)
    if isinstance(keep, str) or not isinstance(keep, Sequence):
        raise ParameterError(f"keep is {keep!r}; give a number, or a list of one per reduction")
    ratios = tuple(fraction("keep", k) for k in keep)
    if len(ratios) != len(reductions):
        raise ParameterError(f"keep has {len(ratios)} fractions for {len(reductions)} reductions")
    if list(ratios) != sorted(ratios, reverse=True):
        raise ParameterError(f"keep {list(ratios)} must not rise from one reduction to the next")
    return ratios


def kept(image_tokens: int, ratio: float) -> int:
    """Tokens of an image that stay: max(1, round(V * ratio))."""
    return max(1, rounded(image_tokens * ratio))


def recycled(count: int, fraction: float | None) -> int:
    """Number of ``count`` kept tokens that absorb others; one token alone absorbs none."""
    return max(1, rounded(fraction * count)) if fraction is not None and count >= 2 else 0


def tokens_per_layer(
    reductions: Sequence[Shortening], ratios: Sequence[float], image_tokens: int, layers: int
) -> list[int]:
    """Tokens of one image that enter each block."""
    counts = [image_tokens] * layers
    for reduction, ratio in zip(reductions, ratios, strict=True):
        counts[reduction.layer :] = [kept(image_tokens, ratio)] * (layers - reduction.layer)
    return counts


def max_entering(
    reductions: Sequence[Shortening],
    ratios: Sequence[float],
    image_tokens: int,
    layers: int,
    images: int,
) -> list[int]:
    """Tokens of so many images that enter each block, at most."""
    found = tokens_per_layer(reductions, ratios, image_tokens, layers)
    at_encoder = [r for r in reductions if isinstance(r, EncoderReduction)]
    if not any(rules()[r.rule].temporal for r in at_encoder):
        return [images * count for count in found]
    # One image may be whole: a still, or a video's first frame, behind which each has one.
    return [max(images * count, image_tokens + images - 1) for count in found]


@dataclass(frozen=True)
class PrefillPlan:
    """The counts of one prefill.

    entries  [L,B] int64: tokens of each row that enter each block, hence its cache entries
    inputs   the recipe's inputs of the prefill graph
    maps     length of each row before each reduction, the shape of its map
    """

    entries: np.ndarray
    inputs: dict[str, np.ndarray]
    maps: tuple[int, ...]


def plan_prefill(
    reductions: Sequence[Shortening],
    ratios: Sequence[float],
    layers: int,
    text_tokens: Sequence[int],
    image_tokens: Sequence[Sequence[int]],
    tail: Sequence[int],
    encoded: Sequence[Sequence[int]] | None = None,
) -> PrefillPlan:
    """Counts for rows of ``text_tokens`` and images of ``image_tokens`` each, before any reduction.

    ``encoded``: those that go on from the encoder, by itself as many of each as its ratio says.
    ``tail``: tokens after each row's last image; the queries of the last ASKING of them may score
    it.
    """
    rows = len(text_tokens)
    images = max(1, *(len(v) for v in image_tokens)) if rows else 1
    lengths = np.array([t + sum(v) for t, v in zip(text_tokens, image_tokens, strict=True)])
    entries = np.tile(lengths, (layers, 1)).astype(np.int64)
    tails = np.clip(np.array(tail, np.int64), 1, ASKING)
    inputs = {"query_count": tails, "query_slots": np.arange(tails.max(), dtype=np.int64)}
    maps: list[int] = []
    for reduction, ratio in zip(reductions, ratios, strict=True):
        before = int(entries[reduction.layer].max())
        keep = np.zeros((rows, images), np.int64)
        recycle = np.zeros((rows, images), np.int64)
        for b, counts in enumerate(image_tokens):
            for m, count in enumerate(counts):
                keep[b, m] = kept(count, ratio)
                if encoded is not None:
                    goes_on = encoded[b][m]
                    at_encoder = isinstance(reduction, EncoderReduction)
                    keep[b, m] = goes_on if at_encoder else min(keep[b, m], goes_on)
                recycle[b, m] = recycled(int(keep[b, m]), reduction.recycle)
        entries[reduction.layer :] = np.array(text_tokens) + keep.sum(1)
        if isinstance(reduction, EncoderReduction):
            continue  # done before the graph
        stage = len(maps)
        maps.append(before)
        inputs |= {
            f"keep_{stage}": keep,
            f"recycle_{stage}": recycle,
            # An extent of 1 where nothing is kept or recycled: engines take no empty tensors.
            f"keep_slots_{stage}": np.arange(max(1, keep.max()), dtype=np.int64),
            f"recycle_slots_{stage}": np.arange(max(1, recycle.max()), dtype=np.int64),
            f"out_slots_{stage}": np.arange(entries[reduction.layer].max(), dtype=np.int64),
        }
    return PrefillPlan(entries, inputs, tuple(maps))
