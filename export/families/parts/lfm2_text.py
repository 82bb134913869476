"""LFM2's text model: layers that attend among layers that convolve over the last few tokens."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.models.lfm2.modeling_lfm2 import (
    Lfm2Attention,
    Lfm2RMSNorm,
    Lfm2RotaryEmbedding,
    Lfm2ShortConv,
)

from lvlm.export.families.parts.leaf_tables import Kinds, text_leaves
from lvlm.export.families.parts.llama_text import model_positions
from lvlm.export.graphs.language_model import LanguageLayer, LanguageModel
from lvlm.export.leaves import Leaf

CONVOLUTION = "causal_conv1d_fn"  # the function of transformers' file that all of them go through


def convolution(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **_: Any
) -> torch.Tensor:
    """Each channel of ``hidden`` [B,D,K-1+N] with its own ``weight`` [D,K], [B,D,N]: a sum of K
    products, for which engines need no kernels of small convolutions."""
    taps = weight.shape[1]
    count = hidden.shape[2] - taps + 1
    parts = [hidden[:, :, i : i + count] * weight[:, i : i + 1] for i in range(taps)]
    mixed = sum(parts[1:], parts[0])
    return mixed if bias is None else mixed + bias[:, None]


class ShortConvolution(Leaf):
    """A layer's convolution: what goes through it has the tokens before it in front."""

    def exchanged(self, module: Any, undo: ExitStack) -> None:
        home = sys.modules[type(module).__module__]
        if getattr(home, CONVOLUTION) is not convolution:
            undo.callback(setattr, home, CONVOLUTION, getattr(home, CONVOLUTION))
            setattr(home, CONVOLUTION, convolution)


TEXTS: Kinds = {
    "lfm2": {
        **text_leaves(Lfm2RMSNorm, Lfm2RotaryEmbedding, Lfm2Attention),
        Lfm2ShortConv: ShortConvolution(),
    }
}


def lfm2_text(parts: Any, head: nn.Module, text: Any) -> LanguageModel:
    """The language model; the last inputs of a convolution are its layer's state."""
    state = 1, text.conv_L_cache - 1, text.hidden_size
    attention = next(layer.self_attn for layer in parts.layers if layer.is_attention_layer)
    return LanguageModel(
        embed=parts.embed_tokens,
        layers=[
            LanguageLayer(
                layer, parts.rotary_emb, state=None if layer.is_attention_layer else state
            )
            for layer in parts.layers
        ],
        norm=parts.embedding_norm,
        head=head,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=attention.head_dim,
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        scale=float(attention.scaling),
        positions=model_positions(text),
    )
