"""A prompt with fewer tokens of its images: how many is known before these are encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from lvlm.runtime.bundle.manifest import EncoderReduction
from lvlm.runtime.kv.image_tokens import kept
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.prompt.prompts import Prompt
from lvlm.runtime.reductions import TemporalRule, rules
from lvlm.runtime.reductions.token_choice import TokenChoice, shared_out


def shortened(prompt: Prompt, reduction: EncoderReduction, ratio: float) -> Prompt:
    """``prompt`` with max(1, round(V * ratio)) tokens of each image of V, or as many of each video
    as its frames would have together. Where their positions are their own, those are known behind
    the encoder (``placed``). A prompt that is shortened already stays as it is."""
    if ratio == 1 or not prompt.images or prompt.images[0].choice is not None:
        return prompt
    stays, images = np.ones(len(prompt.ids), bool), []
    left = tokens_left(prompt.images, reduction, ratio)
    for number, image in enumerate(prompt.images, 1):
        places = np.flatnonzero(prompt.image_id == number)
        parts = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        runs = tuple(len(part) for part in parts)
        counts = shared_out(runs, left[number - 1])
        for part, count in zip(parts, counts, strict=True):
            stays[part[count:]] = False
        choice = TokenChoice(reduction.rule, reduction.settings, runs, counts)
        images.append(replace(image, choice=choice))
    ids = [token for token, stay in zip(prompt.ids, stays, strict=True) if stay]
    image_id = prompt.image_id[stays]
    made = replace(prompt, ids=ids, image_id=image_id, images=images)
    if reduction.places == "closed":
        return replace(made, positions=np.arange(len(ids)))
    return replace(made, positions=prompt.positions[..., stays], whole=prompt)


def tokens_left(
    images: Sequence[PreparedImage], reduction: EncoderReduction, ratio: float
) -> list[int]:
    """Tokens of each image that go on."""
    rule = rules()[reduction.rule]
    if not rule.temporal:
        return [kept(image.tokens, ratio) for image in images]
    videos: list[list[PreparedImage]] = []
    for image in images:
        before = image.before
        if videos and before is not None and before.arrays is videos[-1][-1].arrays:
            videos[-1].append(image)
        else:
            videos.append([image])
    found: list[int] = []
    for video in videos:
        tokens = [image.tokens for image in video]
        total = sum(kept(count, ratio) for count in tokens)
        pixels = [image.arrays["pixel_values"] for image in video]
        found += cast(TemporalRule, rule).shared(pixels, tokens, total)
    return found


def placed(prompt: Prompt, images: Sequence[int], indices: Sequence[np.ndarray]) -> Prompt:
    """The prompt with the positions of the tokens that stay of ``images`` (numbers from 1):
    ``indices`` [K] of each image's V."""
    if prompt.whole is None:
        return prompt
    positions = prompt.positions.copy()
    for number, rows in zip(images, indices, strict=True):
        places = np.flatnonzero(prompt.whole.image_id == number)[rows]
        positions[..., prompt.image_id == number] = prompt.whole.positions[..., places]
    return replace(prompt, positions=positions)
