"""Record per-layer attention importances during prefill.

They come through the hook of the cache rules, so that whatever else a recipe does in prefill stays
as it is. Nothing is evicted meanwhile: the importances are of the whole, merged, sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from lvlm.export.ports import LayerPort
from lvlm.export.recipes.parts.cache_rule import CacheRule, Compacted
from lvlm.export.recipes.parts.sequence import TokenSequence
from lvlm.export.recipes.recipe import WithCache
from lvlm.export.reference.torch_reference import Reference
from lvlm.export.standard_ops import Tap
from lvlm.runtime.policies.evictions import Append
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.policies.scores import AllQueries
from lvlm.runtime.policies.selections import Evict
from lvlm.runtime.policies.shares import Uniform
from lvlm.runtime.prompt.prompts import Prompt

EVERYTHING = CachePolicy(AllQueries(), Evict(), Append(), Uniform(1.0))


def record_importances(reference: Reference, prompt: Prompt) -> list[npt.NDArray[np.float32]]:
    """The importance [N_l] of every entry of every layer, N_l the layer's own length.

    Each is the attention that the entry receives from all prompt queries, its mean over the heads.
    """
    rule = _Recorder(EVERYTHING)
    recorder = copy.copy(reference)
    recorder.recipe = WithCache(reference.recipe, rule)
    prompt = recorder.read_at(prompt)
    features = recorder.encode(prompt.images)
    recorder.generate(prompt, features, max_new_tokens=1)
    return [importance[0].numpy() for importance in rule.importances]


@dataclass(frozen=True)
class _Recorder(CacheRule):
    """A cache rule that keeps everything and remembers the importances [1,N_l]."""

    importances: list[torch.Tensor] = field(default_factory=list)

    def inputs(self) -> list[LayerPort]:
        return []

    def compact_prompt(
        self,
        state: TokenSequence,
        tap: Tap,
        key: torch.Tensor,
        value: torch.Tensor,
        inputs: Mapping[str, torch.Tensor],
    ) -> Compacted:
        del inputs
        self.importances.append(tap.importance)
        return Compacted(key, value, state.length())
