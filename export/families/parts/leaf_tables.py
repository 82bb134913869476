"""The leaf modules of the text models that families share, by config.json's model_type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralRMSNorm,
    MistralRotaryEmbedding,
)
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)

from lvlm.export.leaves import FIXED_TABLES, RMS_NORM, Attention, Rotary, Table, no_window

Kinds = Mapping[str, Table]  # config.json's model_type -> the leaf modules of such a model


def text_leaves(
    norm: type[nn.Module],
    rotary: type[nn.Module],
    attention: type[nn.Module],
    kinds: tuple[str, ...] = FIXED_TABLES,
    window: Callable[[Any], int | None] = no_window,
) -> Table:
    """Those of a Llama-like text model: its classes, the kinds of rotary tables that it can have,
    the window of one of its attentions."""
    return {norm: RMS_NORM, rotary: Rotary(kinds), attention: Attention(window)}


def layer_window(attention: Any) -> int | None:
    """The window of a layer; transformers' configuration says which have one (``layer_types``)."""
    found: int | None = attention.sliding_window
    return found


TEXTS: Kinds = {
    "llama": text_leaves(LlamaRMSNorm, LlamaRotaryEmbedding, LlamaAttention),
    "mistral": text_leaves(
        MistralRMSNorm,
        MistralRotaryEmbedding,
        MistralAttention,
        window=lambda attention: attention.config.sliding_window,
    ),
    "qwen2": text_leaves(Qwen2RMSNorm, Qwen2RotaryEmbedding, Qwen2Attention, window=layer_window),
}


def with_rope_types(table: Table, *more: str) -> Table:
    """The same with further kinds of rotary tables, which the family makes of one that is known."""
    return {
        kind: replace(leaf, kinds=(*leaf.kinds, *more)) if isinstance(leaf, Rotary) else leaf
        for kind, leaf in table.items()
    }


def leaves(*kinds: Kinds) -> Table:
    """The leaf modules of all of them: a family's table."""
    return {
        kind: leaf for known in kinds for table in known.values() for kind, leaf in table.items()
    }


def rope_types(table: Table) -> tuple[str, ...]:
    """The kinds of rotary tables that models of these leaf modules can have."""
    return next((leaf.kinds for leaf in table.values() if isinstance(leaf, Rotary)), ())
