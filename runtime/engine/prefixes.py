"""Shared prefixes: when two prompts begin alike, images included, and when reuse pays."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from lvlm.runtime.prompt.prompts import Prompt

# Where decode reads the rest of a prompt, token by token: each takes as long as this many in
# prefill do, about (docs/notes/performance.md).
TOKEN_COST = 8
# Tokens of a prompt for each that is worth the copy of its entries, where extend reads the rest
WORTH_A_COPY = 8
_MOVED = 2**62  # makes a key less than any other, by itself and with 56 bits of how far


def prompt_keys(prompt: Prompt, digests: Sequence[bytes]) -> np.ndarray:
    """int64 [N]: a token's id for text, for the k-th token of an image a negative number made of
    the image's digest and k. One whose positions are moved (Prompt.aligned) begins like those alone
    that are moved as far: the entries of others lie at other distances."""
    keys = np.array(prompt.ids, np.int64)
    for image, digest in enumerate(digests, 1):
        places = np.flatnonzero(prompt.image_id == image)
        start = int.from_bytes(digest[:7], "little")  # below 2**56: no overflow
        keys[places] = -1 - start - np.arange(len(places))
    moved = (prompt.aligned - prompt.positions)[..., 0]
    if moved.any():
        keys[0] -= _MOVED + int.from_bytes(
            blake2b(moved.tobytes(), digest_size=7).digest(), "little"
        )
    return keys


def worthwhile(prompt: Prompt, length: int, *, extends: bool) -> bool:
    """True where reading only what follows the first ``length`` tokens pays: by the graph extend,
    which ``extends`` says there is, or else by decode, which reads text alone."""
    rest = len(prompt.ids) - length
    if extends:
        return length * WORTH_A_COPY >= len(prompt.ids)
    return not (prompt.image_id[length:] > 0).any() and rest * TOKEN_COST <= length
