"""LFM2-VL's tower, SigLIP 2 for parts of images of any size, and its projection."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.models.siglip2.modeling_siglip2 import Siglip2Attention

from lvlm.export.families.parts.leaf_tables import Kinds
from lvlm.export.graphs.repeats import like, repeated
from lvlm.export.leaves import Attention

TOWERS: Kinds = {"siglip2_vision_model": {Siglip2Attention: Attention(turn=None)}}


class Lfm2Vision(nn.Module):
    """Parts of images to image tokens: the tower under a mask, then the projection.

    pixel_values  [units,T,p,patch*patch*3] fp32: T tokens of p patches, padded
    position_ids  [units,T,p,2] int64: row and column of each patch, -1 where there is none
    sides         [units,2] int64: rows and columns of patches
    -> [units * T,D], of padding whatever it gives
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector

    def forward(
        self, pixel_values: torch.Tensor, position_ids: torch.Tensor, sides: torch.Tensor
    ) -> torch.Tensor:
        embed = self.tower.embeddings.patch_embedding
        tokens, each = position_ids.shape[1:3]
        places = position_ids.flatten(1, 2)
        hidden = embed(pixel_values.flatten(1, 2).to(embed.weight.dtype))
        hidden = hidden + self._positions(places, sides).to(hidden.dtype)
        seen = (places[..., 0] >= 0)[:, None, None].expand(-1, 1, tokens * each, -1)
        for layer in self.tower.encoder.layers:
            given = {"hidden": hidden, "mask": seen}
            hidden = repeated(_layer, layer, given, {"hidden": like(hidden)})["hidden"]
        features = self.tower.post_layernorm(hidden)
        # A token's patches lie side by side, as transformers' pixel_unshuffle puts them
        features = features.reshape(-1, tokens, each * features.shape[-1]).flatten(0, 1)
        projector = self.projector
        if projector.use_layer_norm:
            features = projector.layer_norm(features)
        rows = projector.linear_2(projector.act(projector.linear_1(features)))
        assert isinstance(rows, torch.Tensor)
        return rows

    def _positions(self, places: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
        """Learned positions fp32 [units,patches,d] at ``places`` [units,patches,2]: of the square
        of them stretched over each part.

        As torch's bilinear interpolation with antialiasing computes them: what is shrunk is the
        mean of all that falls together, each with its share.
        """
        learned: torch.Tensor = self.tower.embeddings.position_embedding.weight.float()
        side = math.isqrt(learned.shape[0])
        centres = torch.arange(side, device=places.device) + 0.5
        shares = []
        for axis in range(2):
            step = side / sides[:, axis, None].float()  # [units,1]
            at = (places[..., axis].clamp(min=0).float() + 0.5) * step
            reach = step.clamp(min=1.0)[..., None]
            share = (1 - (centres - at[..., None]).abs() / reach).clamp(min=0.0)
            shares.append(share / share.sum(-1, keepdim=True))
        row, column = shares
        return (row[..., None] * column[..., None, :]).flatten(2) @ learned


def _layer(layer: Any, hidden: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"hidden": layer(hidden, mask)}
