"""Qwen3.5's text model: layers that attend, with a gate on what they give, among layers of linear
attention by the gated delta rule."""

from __future__ import annotations

import types
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5Attention,
    Qwen3_5GatedDeltaNet,
    Qwen3_5RMSNorm,
    Qwen3_5RMSNormGated,
    Qwen3_5TextRotaryEmbedding,
)

from lvlm.export.families.parts.leaf_tables import text_leaves
from lvlm.export.families.parts.qwen_vl_like import ROPES
from lvlm.export.graphs.blocks import StateBehind
from lvlm.export.graphs.language_model import LayerState
from lvlm.export.leaves import ZERO_CENTRED, Leaf, Table
from lvlm.export.standard_ops import rms_normalization


class GatedDeltaNet(Leaf):
    """A layer's linear attention."""

    def exchanged(self, module: Any, undo: ExitStack) -> None:
        module.forward = types.MethodType(gated_delta_net, module)
        undo.callback(module.__dict__.pop, "forward")


class GatedNorm(Leaf):
    """A normalisation of each head, whose output is gated."""

    def exchanged(self, module: Any, undo: ExitStack) -> None:
        module.forward = types.MethodType(gated_norm, module)
        undo.callback(module.__dict__.pop, "forward")


def gated_delta_net(
    module: Any, hidden_states: torch.Tensor, cache_params: StateBehind, **_: Any
) -> torch.Tensor:
    """The output of Qwen3_5GatedDeltaNet for ``hidden_states`` [B,N,D].

    Source: transformers 5.23. Its convolution has its channels last here, as LFM2's (lfm2_text.py);
    its chunks are ``lvlm::GatedDeltaRule``, its single step plain operations.
    """
    count, keys = hidden_states.shape[1], module.key_dim
    whole = cache_params.behind(module.in_proj_qkv(hidden_states))
    weight = module.conv1d.weight[:, 0]
    parts = [whole[:, i : i + count] * weight[:, i] for i in range(weight.shape[1])]
    mixed = nn.functional.silu(sum(parts[1:], parts[0]))
    query, key, value = (
        part.reshape(*part.shape[:2], -1, width).float()
        for part, width in (
            (mixed[..., :keys], module.head_k_dim),
            (mixed[..., keys : 2 * keys], module.head_k_dim),
            (mixed[..., 2 * keys :], module.head_v_dim),
        )
    )
    beta = module.in_proj_b(hidden_states).float().sigmoid()
    time = module.in_proj_a(hidden_states).float() + module.dt_bias.float()
    decay = -module.A_log.float().exp() * nn.functional.softplus(time)
    query = _normalised(query) * module.head_k_dim**-0.5
    found = cache_params.delta_rule(query, _normalised(key), value, decay, beta)
    gate = module.in_proj_z(hidden_states).reshape(found.shape)
    found = module.norm(found.to(hidden_states.dtype), gate)
    out = module.out_proj(found.flatten(2))
    assert isinstance(out, torch.Tensor)
    return out


def _normalised(x: torch.Tensor) -> torch.Tensor:
    """Vectors along the last axis, of length 1, or less where there is next to nothing."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def gated_norm(module: Any, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Normalised and scaled, then times silu of the gate in fp32."""
    scaled = rms_normalization(hidden_states, module.weight, module.variance_epsilon)
    return (scaled * nn.functional.silu(gate.float())).to(hidden_states.dtype)


TEXT: Table = {
    **text_leaves(Qwen3_5RMSNorm, Qwen3_5TextRotaryEmbedding, Qwen3_5Attention, ROPES),
    Qwen3_5RMSNorm: ZERO_CENTRED,
    Qwen3_5RMSNormGated: GatedNorm(),
    Qwen3_5GatedDeltaNet: GatedDeltaNet(),
}


def qwen3_5_states(text: Any) -> tuple[LayerState, LayerState]:
    """The states of a layer of linear attention: its convolution's last inputs, a matrix for each
    value head."""
    keys = text.linear_num_key_heads * text.linear_key_head_dim
    heads, width = text.linear_num_value_heads, text.linear_value_head_dim
    return (
        LayerState(text.linear_conv_kernel_dim - 1, 2 * keys + heads * width),
        LayerState(heads * text.linear_key_head_dim, width, heads),
    )
