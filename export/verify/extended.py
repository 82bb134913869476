"""Comparisons for the graph extend: a prompt in pieces against the same prompt read as a whole, an
answer's tokens at once against one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.engine.calls import Calls
from lvlm.runtime.generate.call_plan import count_prompts
from lvlm.runtime.generate.loaded_graphs import Graphs
from lvlm.runtime.generate.pieces import border_before
from lvlm.runtime.generate.tokens_behind import TokensBehind
from lvlm.runtime.prompt.prompts import Prompt


@dataclass(frozen=True)
class Beginning(Prompt):
    """Tokens whose positions are as they are: the first ones of a prompt, say, with those that the
    whole gets."""

    @property
    def aligned(self) -> np.ndarray:
        return self.positions


def cuts(prompt: Prompt, form: Images) -> list[int]:
    """Places to cut a prompt: before its images, in the middle of one or, where that cannot be,
    before it, behind them; what of that there is."""
    images = np.flatnonzero(prompt.image_id > 0)
    if not len(images):
        return [len(prompt.ids) // 2]
    first, last = int(images[0]), int(images[-1])
    middle = int(images[len(images) // 2])
    if form.bidirectional:
        middle = border_before(prompt.image_id, middle)
    found = (first, middle, last + 1)
    return [cut for cut in dict.fromkeys(found) if 0 < cut < len(prompt.ids)]


def in_pieces(graphs: Graphs, prompt: Prompt, features: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits [vocabulary] after the prompt, read up to each of the cuts by prefill, then by extend;
    last of all by extend alone, as where nothing was read before.

    Raises LvlmError where a graph cannot be run.
    """
    counts = count_prompts(graphs.manifest, [prompt], None, None)
    cache = Calls(graphs).cache_for(1, counts.prefill.entries.max(1), counts.budgets)
    row = cache.views(slice(0, 1))
    prefill, extend = graphs.bind("prefill", row), graphs.bind("extend", row)
    whole, found = range(len(prompt.ids)), []
    rows = np.concatenate(features) if len(features) else np.zeros((0, 0), np.float32)
    for cut in (*cuts(prompt, graphs.manifest.images), 0):
        if cut:
            graphs.prefill([_first(prompt, cut)], counts, features, prefill)
        found.append(graphs.extend(prompt, whole[cut:], rows, extend)[0])
    return found


def at_once(
    graphs: Graphs, prompt: Prompt, features: Sequence[np.ndarray], tokens: Sequence[int]
) -> np.ndarray:
    """Logits [vocabulary] after the tokens of an answer, one or more, read at once behind what
    prefill leaves of the prompt: those that decode gives after one step for each.

    Raises LvlmError where a graph cannot be run.
    """
    counts = count_prompts(graphs.manifest, [prompt], None, None)
    entries, fed = counts.prefill.entries, np.array([len(tokens)])
    cache = Calls(graphs).cache_for(1, counts.budgets.capacity(entries, fed), counts.budgets)
    row = cache.views(slice(0, 1))
    graphs.prefill([prompt], counts, features, graphs.bind("prefill", row))
    cache.begin(entries, counts.kept)
    behind = TokensBehind(graphs, row, cache)
    nothing = np.zeros((0, graphs.manifest.feature_width), np.float32)
    logits: np.ndarray = behind.read(answered(prompt, tokens), len(prompt.ids), nothing)[0]
    return logits


def answered(prompt: Prompt, tokens: Sequence[int]) -> Beginning:
    """A prompt with the tokens of its answer, where decode has them."""
    given = {field.name: getattr(prompt, field.name) for field in fields(prompt)}
    own = np.arange(len(tokens)) + prompt.next_position
    positions = [prompt.aligned, np.broadcast_to(own, (*prompt.aligned.shape[:-1], len(own)))]
    return Beginning(
        **given
        | {
            "ids": [*prompt.ids, *tokens],
            "image_id": np.concatenate([prompt.image_id, np.zeros(len(tokens), np.int64)]),
            "positions": np.concatenate(positions, axis=-1),
        }
    )


def _first(prompt: Prompt, count: int) -> Beginning:
    given = {field.name: getattr(prompt, field.name) for field in fields(prompt)}
    return Beginning(
        **given
        | {
            "ids": prompt.ids[:count],
            "image_id": prompt.image_id[:count],
            "positions": prompt.aligned[..., :count],
        }
    )
