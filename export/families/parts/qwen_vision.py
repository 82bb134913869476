"""The vision tower of the Qwen-VL families: transformers' modules, their attention written anew."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lvlm.export.graphs.repeats import like, repeated
from lvlm.export.standard_ops import attention


class QwenVision(nn.Module):
    """Patches of one image to image tokens: blocks with full attention or in windows.

    pixel_values [V,p,3*frames*patch*patch] fp32, position_ids [V,p,2] int64: V tokens of p patches
    window        [W,n] int64: the tokens of each window, -1 none; place [V]: where each token is
                  among these
    -> [V,D]

    Only the attention is written anew: transformers' own splits the patches at lengths that it
    reads from a tensor, which no graph can.
    """

    def __init__(self, model: Any, full: Collection[int] | None) -> None:
        super().__init__()
        self.visual = model.model.visual
        self.full = range(len(self.visual.blocks)) if full is None else full

    def forward(
        self,
        pixel_values: torch.Tensor,
        position_ids: torch.Tensor,
        window: torch.Tensor | None = None,
        place: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden = patches(self.visual, pixel_values)
        everywhere = VisionAngles.of(self.visual, hidden, position_ids)
        inside = None if window is None else everywhere.gathered(window, hidden.shape[1])
        for layer, block in enumerate(self.visual.blocks):
            angles = everywhere if layer in self.full or inside is None else inside
            hidden = run_block(block, hidden, angles, place)
        rows = self.visual.merger(hidden)
        assert isinstance(rows, torch.Tensor)
        return rows


def patches(visual: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """[V,p,3*frames*patch*patch] -> [V,p,D]. The convolution's stride is its kernel: a product."""
    proj = visual.patch_embed.proj
    pixels = pixel_values.to(proj.weight.dtype)
    return nn.functional.linear(pixels, proj.weight.flatten(1), proj.bias)


def run_block(
    block: Any, hidden: torch.Tensor, angles: VisionAngles, place: torch.Tensor | None = None
) -> torch.Tensor:
    """A vision block on [V,p,D]."""
    given = {"hidden": hidden, "cos": angles.cos, "sin": angles.sin}
    if angles.window is not None:
        assert angles.mask is not None
        assert place is not None
        given |= {"window": angles.window, "mask": angles.mask, "place": place}
    return repeated(_block, block, given, {"hidden": like(hidden)})["hidden"]


def _block(
    block: Any,
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    window: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    place: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    angles = VisionAngles(cos, sin, window, mask)
    hidden = hidden + _attend(block.attn, block.norm1(hidden), angles, place)
    return {"hidden": hidden + block.mlp(block.norm2(hidden))}


class VisionAngles:
    """cos and sin [W,N,d] of the patches that attend to one another, W windows of N or one of all;
    in windows also ``window`` [W,n] and ``mask`` [W,1,N,N]."""

    def __init__(
        self,
        cos: torch.Tensor,
        sin: torch.Tensor,
        window: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        self.cos, self.sin = (x if x.dim() == 3 else x[None] for x in (cos, sin))
        self.window, self.mask = window, mask

    @classmethod
    def of(cls, visual: Any, hidden: torch.Tensor, position_ids: torch.Tensor) -> VisionAngles:
        return cls(*visual.rotary_pos_emb(hidden, position_ids.flatten(0, 1)))

    def gathered(self, window: torch.Tensor, patches: int) -> VisionAngles:
        size = self.cos.shape[-1]
        index = window.clamp(min=0)
        cos, sin = (
            nn.functional.embedding(index, x.reshape(-1, patches * size)).reshape(
                -1, window.shape[1] * patches, size
            )
            for x in (self.cos, self.sin)
        )
        seen = (window >= 0)[..., None].expand(-1, -1, patches).flatten(1)
        mask = seen[:, None, None].expand(-1, 1, seen.shape[1], -1)
        return VisionAngles(cos, sin, index, mask)


def _attend(
    module: Any, hidden: torch.Tensor, angles: VisionAngles, place: torch.Tensor | None
) -> torch.Tensor:
    """The attention ``module`` of a vision block on [V,p,D]."""
    tokens, patches, width = hidden.shape
    rows = module.qkv(hidden)
    if angles.window is not None:
        rows = nn.functional.embedding(angles.window, rows.flatten(1))
    windows, length, size = angles.cos.shape
    rows = rows.reshape(windows, length, 3, -1, size).permute(2, 0, 3, 1, 4)
    query, key, value = rows.unbind(0)
    home = sys.modules[type(module).__module__]
    turned = home.apply_rotary_pos_emb(query.float(), key.float(), angles.cos, angles.sin)
    query, key = (x.to(value.dtype) for x in turned)
    out, _ = attention(module, query, key, value, angles.mask, module.scaling)
    if angles.window is not None:
        assert place is not None
        out = nn.functional.embedding(place, out.reshape(-1, patches * width))
    result = module.proj(out.reshape(tokens, patches, width))
    assert isinstance(result, torch.Tensor)
    return result
