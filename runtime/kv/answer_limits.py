"""Limits of an answer's length within a bundle's capacity, from counts, before anything is run."""

from __future__ import annotations

import numpy as np

from lvlm.core.errors import CapacityError
from lvlm.runtime.bundle.manifest import Capacity
from lvlm.runtime.kv.budgets import Budgets


def new_token_limit(
    capacity: Capacity,
    budgets: Budgets,
    entries: np.ndarray,
    text_tokens: int,
    images: int,
    wanted: int,
) -> int:
    """New tokens, up to ``wanted``, for a prompt of which ``entries`` [L] enter each layer.

    Raises CapacityError, which names the limit, if there is no room for any.
    """
    if images > capacity.max_images:
        raise CapacityError(
            f"{images} images, but there is room for --max-images {capacity.max_images}; give "
            "fewer, or export with more"
        )
    if text_tokens >= capacity.max_text_len:
        raise CapacityError(
            f"the prompt has {text_tokens} text tokens, but there is room for --max-text-len "
            f"{capacity.max_text_len} of prompt and answer; shorten it or export with more"
        )
    wanted = min(wanted, capacity.max_text_len - text_tokens)
    slots, kept = np.array(capacity.per_layer), budgets.prompt(entries[:, None])[:, 0]
    if (kept > slots).any():
        layer = int((kept - slots).argmax())
        raise CapacityError(
            f"at these ratios layer {layer} needs {kept[layer]} cache entries, there are "
            f"{slots[layer]}; lower keep or kv_keep, or export with a larger one"
        )
    return 1 + budgets.room(entries, slots, wanted - 1)  # the last token is never fed back
