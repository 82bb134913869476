"""Prompts of random tokens and one random image, for the benchmarks."""

from __future__ import annotations

import numpy as np

from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.prompt.prompts import Prompt
from lvlm.runtime.sampling.settings import Sampling

BEFORE = 5  # tokens before the image's


def random_prompt(
    length: int,
    new: int,
    seed: int = 0,
    *,
    tokens: int = 576,
    size: tuple[int, ...] = (336, 336),
    token_id: int = 3,
    vocab: int = 512,
) -> Prompt:
    """``length`` tokens, ``tokens`` of them the image's where they and a question fit, of a model
    like LLaVA's, by default that of make_checkpoint.py; ``new`` to generate."""
    random = np.random.default_rng(seed)
    ids, image_id = random.integers(10, min(512, vocab), length), np.zeros(length, np.int64)
    prepared = []
    if length > BEFORE + tokens:
        place = slice(BEFORE, BEFORE + tokens)
        image_id[place], ids[place] = 1, token_id
        pixels = random.normal(size=(1, 3, *size)).astype(np.float32)
        prepared.append(PreparedImage({"pixel_values": pixels}, tokens, np.arange(tokens)[:, None]))
    return Prompt(ids.tolist(), image_id, prepared, np.arange(length), Sampling(), new)


def prompt_for(manifest: Manifest, length: int, new: int, seed: int = 0) -> Prompt:
    """The same for a bundle of a model like LLaVA's."""
    images = manifest.images
    return random_prompt(
        length,
        new,
        seed,
        tokens=images.tokens,
        size=images.size,
        token_id=images.token_id,
        vocab=manifest.text.vocab,
    )
