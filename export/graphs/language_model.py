"""A decoder-only language model as its parts: what families give and graphs are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal, Self

from torch import nn

from lvlm.export.standard_ops import logit_attributes


@dataclass(frozen=True)
class LanguageLayer:
    """A block of a language model, and how it tells positions from one another.

    block   transformers' module, whatever its class
    rotary  (hidden, position_ids) -> cos and sin [B,N,d]: the angles that turn queries and keys
    window  how many positions a token sees, itself and those before it; None: all of them
    state   sizes of what a row keeps of all tokens so far in place of their entries, (n,D) of a
            convolution: its inputs for the last n tokens; None: the block attends
    """

    block: nn.Module
    rotary: nn.Module
    window: int | None = None
    state: tuple[int, int] | None = None


@dataclass(frozen=True)
class LanguageModel:
    """The parts of a decoder-only language model, whatever their class.

    Its blocks attend, each over a cache of entries, or convolve, each with a state of fixed size.
    Wherever caches are counted, layer l is the l-th of those that attend.
    """

    embed: nn.Module
    layers: Sequence[LanguageLayer]
    norm: nn.Module
    head: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    scale: float  # of query · key in every block's attention
    positions: int  # the model is made for: of a prompt and its answer
    longest: int | None = None  # positions that the rotary angles hold for, None: any number
    position_rows: int = 1  # rotary positions per token: 3 with M-RoPE
    deepstack_layers: int = 0  # first blocks whose output gets image features of its own added
    # Whose tokens see those that follow, too: each image's, or the whole prompt's
    bidirectional: Literal["", "image", "prompt"] = ""
    softcap: float = 0.0  # if not 0, attention's logits x become softcap · tanh(x / softcap)
    head_softcap: float = 0.0  # likewise the head's

    @property
    def blocks(self) -> list[nn.Module]:
        """Every layer's block."""
        return [layer.block for layer in self.layers]

    @property
    def logits(self) -> dict[str, float]:
        """Attributes of ops that make logits as every block's attention does."""
        return logit_attributes(self.scale, self.softcap)

    @property
    def attending(self) -> list[LanguageLayer]:
        """The layers that attend, each with a cache of its own."""
        return [layer for layer in self.layers if layer.state is None]

    @property
    def states(self) -> tuple[tuple[int, int, int], ...]:
        """Sizes of the buffers of states: of all layers that have one, (layers,n,D)."""
        found = [layer.state for layer in self.layers if layer.state is not None]
        assert len(set(found)) <= 1  # else a buffer for each size
        return tuple((len(found), *sizes) for sizes in dict.fromkeys(found))

    def numbered(self) -> list[tuple[int, LanguageLayer]]:
        """Every layer, with its number among those that attend, or among those that do not."""
        attend, convolve = count(), count()
        return [(next(convolve if one.state else attend), one) for one in self.layers]

    @property
    def rotaries(self) -> list[nn.Module]:
        """The rotary embeddings, each once, in the order that layers use them."""
        return list({id(layer.rotary): layer.rotary for layer in self.layers}.values())

    @property
    def feature_width(self) -> int:
        """Numbers per image token: what replaces its embedding, then what each block gets."""
        return self.hidden * (1 + self.deepstack_layers)

    @property
    def full_length(self) -> int | None:
        """Tokens up to which every layer sees all of them, and angles hold; None: any number."""
        limits = [self.longest, *(layer.window for layer in self.layers)]
        return min((limit for limit in limits if limit is not None), default=None)

    def windowed(self, length: int) -> list[int]:
        """The layers that hide something of a sequence of that length."""
        return [
            number
            for number, layer in enumerate(self.layers)
            if layer.window is not None and layer.window < length
        ]

    def within(self, length: int) -> Self:
        """The same for sequences of at most that length: without windows that hide nothing."""
        hiding = self.windowed(length)
        return replace(
            self,
            layers=[
                layer if number in hiding else replace(layer, window=None)
                for number, layer in enumerate(self.layers)
            ],
        )

    def with_rotary(self, rotary: nn.Module) -> Self:
        """The same with one rotary embedding for all layers."""
        return replace(self, layers=[replace(layer, rotary=rotary) for layer in self.layers])
