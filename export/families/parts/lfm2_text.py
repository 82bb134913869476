"""LFM2's text model: layers that attend among layers that convolve over the last few tokens."""

from __future__ import annotations

import types
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
from lvlm.export.graphs.blocks import StateBehind
from lvlm.export.graphs.language_model import LanguageLayer, LanguageModel, LayerState
from lvlm.export.leaves import Leaf


class ShortConvolution(Leaf):
    """A layer's convolution between two gates."""

    def exchanged(self, module: Any, undo: ExitStack) -> None:
        module.forward = types.MethodType(short_convolution, module)
        undo.callback(module.__dict__.pop, "forward")


def short_convolution(
    module: Any, hidden_states: torch.Tensor, past_key_values: StateBehind, **_: Any
) -> torch.Tensor:
    """The output of Lfm2ShortConv for ``hidden_states`` [B,N,D], its channels last.

    transformers turns them to the front and back, which TensorRT-RTX 1.7 cannot build beside a
    state in fp16. A sum of K products needs no kernel for small convolutions.
    """
    before, after, new = module.in_proj(hidden_states).chunk(3, dim=-1)
    whole = past_key_values.behind(before * new)
    weight, count = module.conv.weight[:, 0], hidden_states.shape[1]
    parts = [whole[:, i : i + count] * weight[:, i] for i in range(weight.shape[1])]
    mixed = sum(parts[1:], parts[0])
    if module.conv.bias is not None:
        mixed = mixed + module.conv.bias
    out = module.out_proj(after * mixed)
    assert isinstance(out, torch.Tensor)
    return out


TEXTS: Kinds = {
    "lfm2": {
        **text_leaves(Lfm2RMSNorm, Lfm2RotaryEmbedding, Lfm2Attention),
        Lfm2ShortConv: ShortConvolution(),
    }
}


def lfm2_text(parts: Any, head: nn.Module, text: Any) -> LanguageModel:
    """The language model; the last inputs of a convolution are its layer's state."""
    state = LayerState(text.conv_L_cache - 1, text.hidden_size)
    attention = next(layer.self_attn for layer in parts.layers if layer.is_attention_layer)
    return LanguageModel(
        embed=parts.embed_tokens,
        layers=[
            LanguageLayer(
                layer, parts.rotary_emb, states=() if layer.is_attention_layer else (state,)
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
