"""A decoder-only language model as its parts: what families give and graphs are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal, Self

from torch import nn

from lvlm.export.standard_ops import logit_attributes


@dataclass(frozen=True)
class LayerState:
    """Something of fixed size that a layer keeps of a row's tokens so far: [rows,width].

    heads  whose matrices lie under each other in it; 0: it is the inputs of a convolution
    """

    rows: int
    width: int
    heads: int = 0

    @property
    def exact(self) -> bool:
        """It is kept in fp32, whatever the type of the cache: sums go on in it."""
        return self.heads > 0


@dataclass(frozen=True)
class LanguageLayer:
    """A block of a language model, and how it tells positions from one another.

    block   transformers' module, whatever its class
    rotary  (hidden, position_ids) -> cos and sin [B,N,d]: the angles that turn queries and keys
    window  how many positions a token sees, itself and those before it; None: all of them
    states  what the block keeps in place of entries; (): it attends. First the inputs of its
            convolution for the last tokens, then the matrices of linear attention, if it has these
    """

    block: nn.Module
    rotary: nn.Module
    window: int | None = None
    states: tuple[LayerState, ...] = ()


@dataclass(frozen=True)
class LanguageModel:
    """The parts of a decoder-only language model, whatever their class.

    Its blocks attend, each over a cache of entries, or keep states of fixed size, all the same
    ones. Wherever caches are counted, layer l is the l-th of those that attend.
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
        return [layer for layer in self.layers if not layer.states]

    @property
    def states(self) -> tuple[LayerState, ...]:
        """The states of every layer that has some."""
        found = {layer.states for layer in self.layers if layer.states}
        assert len(found) <= 1  # else buffers for each form
        return next(iter(found), ())

    @property
    def state_sizes(self) -> tuple[tuple[int, int, int], ...]:
        """Sizes of the buffers of states, each of all layers: (layers,rows,width)."""
        count = len(self.layers) - len(self.attending)
        return tuple((count, state.rows, state.width) for state in self.states)

    def numbered(self) -> list[tuple[int, LanguageLayer]]:
        """Every layer, with its number among those that attend, or among those that do not."""
        attend, others = count(), count()
        return [(next(others if one.states else attend), one) for one in self.layers]

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
