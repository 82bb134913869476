"""A decoder-only language model as its parts: what families give and graphs are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class LanguageModel:
    """The parts of a decoder-only language model, whatever their class."""

    embed: nn.Module
    rotary: nn.Module
    blocks: Sequence[nn.Module]
    norm: nn.Module
    head: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    scale: float  # of query · key in every block's attention
    positions: int  # the model is made for: of a prompt and its answer
    window: int | None = None  # keys a query can see, or length that rotary angles hold for
    position_rows: int = 1  # rotary positions per token: 3 with M-RoPE
    deepstack_layers: int = (
        0  # first blocks whose output gets image features of its own added (DeepStack)
    )

    @property
    def feature_width(self) -> int:
        """Numbers per image token: what replaces its embedding, then what each block gets."""
        return self.hidden * (1 + self.deepstack_layers)
