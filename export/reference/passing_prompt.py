"""Prompts on their way through a language model, block by block.

Of all prompts what lies between two blocks is held, and of the model one block has to be in memory:
for what is measured, or changed, in one block after the other.
"""

from __future__ import annotations

import numpy as np
import torch

from lvlm.export.graphs.attending import Angles, Masks
from lvlm.export.graphs.blocks import PromptEntries, StateBehind, run_block
from lvlm.export.graphs.embedded import EmbeddedTokens
from lvlm.export.reference.torch_reference import Reference
from lvlm.export.standard_ops import Tap
from lvlm.runtime.prompt.prompts import Prompt


class PassingPrompt:
    """A prompt at one block of a model, all of its tokens, whatever the recipe.

    Attributes:
        hidden: fp32 [1,N,D], which enters the next block; the head's norm after the last one.
    """

    @torch.no_grad()
    def __init__(self, reference: Reference, prompt: Prompt) -> None:
        self._language = language = reference.language
        features = reference.encode(prompt.images)
        rows = np.full(len(prompt.ids), -1)
        rows[prompt.image_id > 0] = np.arange(len(features))
        self._embedded = EmbeddedTokens(
            language,
            {
                "input_ids": torch.tensor([list(prompt.ids)]),
                "image_row": torch.from_numpy(rows)[None],
                "image_features": features
                if len(features)
                else features.new_zeros(1, language.feature_width),
            },
        )
        self.hidden = self._embedded.hidden
        self._positions = torch.from_numpy(prompt.positions[..., None, :])
        self._image_id = torch.from_numpy(prompt.image_id)[None]
        self._angles, self._masks = Angles(), Masks(bidirectional=language.bidirectional)

    @torch.no_grad()
    def through(self, number: int) -> torch.Tensor:
        """The output of block ``number`` for ``hidden``, which stays."""
        layer, hidden = self._language.layers[number], self.hidden
        if layer.states:
            cache = StateBehind(layer.states[0].rows)
            out = layer.block(hidden, position_embeddings=None, past_key_values=cache)
            return self._embedded.with_features(number, out)
        cos, sin = self._angles.of(layer.rotary, hidden, self._positions)
        mask = self._masks.of(layer.window, self._image_id)
        tap = Tap(scale=self._language.scale, softcap=self._language.softcap)
        out = run_block(
            layer.block, hidden, self._positions, (cos, sin), PromptEntries(), tap, mask
        )
        return self._embedded.with_features(number, out)

    def pass_block(self, number: int) -> None:
        """Go on to the next block."""
        self.hidden = self.through(number)
