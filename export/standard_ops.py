"""Standard ONNX ops (opset 23 and 24) in the place of transformers' modules.

The checkpoint's own modules run; only their leaves are exchanged (leaves.py): attention, rotary
embedding, RMS normalisation and the cache write. While torch.export traces, each leaves one node in
the placeholder domain ``lvlm.std``, which tracing.py turns into the standard domain afterwards
(torch's exporter builds at opset 18 and could not convert ops that are newer). Run eagerly, the
same modules compute with torch: this is the torch reference of every recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lvlm.core.errors import CheckpointError
from lvlm.export.ops.cache_importance import OP as CACHE_IMPORTANCE
from lvlm.export.ops.causal_attention import OP as CAUSAL_ATTENTION

PLACEHOLDER_DOMAIN = "lvlm.std"
OTHER_LOGITS = ("s_aux", "position_bias")  # what attentions may add and no graph here has


def logit_attributes(scale: float, softcap: float) -> dict[str, float]:
    """Attributes of ops that make logits of attention: query · key times ``scale``, then, if
    ``softcap`` is not 0, softcap · tanh(x / softcap)."""
    return {"scale": scale} | ({"softcap": softcap} if softcap else {})


@dataclass
class Tap:
    """Receives the query [B,Hq,N,d] and key [B,Hkv,N,d] of one attention, rotary applied.

    With ``length`` [B] int64, the valid tokens of each row, an attention of the prompt over itself
    also gives every position's importance [B,N] fp32: the attention it receives from all queries.
    Under a mask ``ends`` [B,N] int64 says the same as that: the last place that each token sees.
    """

    length: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    query: torch.Tensor = field(init=False)
    key: torch.Tensor = field(init=False)
    importance: torch.Tensor = field(init=False)

    @property
    def logits(self) -> dict[str, float]:
        """Attributes of ops that make logits as the attention has made them."""
        return logit_attributes(self.scale, self.softcap)

    def queries_at(self, index: torch.Tensor) -> torch.Tensor:
        """The queries [B,Hq,R,d] at ``index`` [B,R] int64; below 0: any.

        Picked in fp32: in fp16 TensorRT-RTX 1.7's builder crashes on prefill graphs that do so, or
        finds "uses before defs" in them (docs/tensorrt.md).
        """
        wanted = index.clamp(min=0)[:, None, :, None]
        wanted = wanted.expand(-1, self.query.shape[1], -1, self.query.shape[3])
        return self.query.float().gather(2, wanted).to(self.query.dtype)


def _node(
    op_type: str, inputs: list[torch.Tensor], attributes: dict[str, Any], like: torch.Tensor
) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        f"{PLACEHOLDER_DOMAIN}::{op_type}",
        inputs,
        attributes,
        dtype=like.dtype,
        shape=like.shape,
        version=1,
    )


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    tap: Tap | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: q [B,Hq,N,d], k and v [B,Hkv,S,d] -> [B,N,Hq,d].

    A mask is boolean [B,1,N or 1,S], True where a key may be seen. Without one a language model's
    block, which gives a tap, is causal (rows are padded on the right, so a valid query never sees
    padding), and others see everything. Logits may be capped (``softcap``), under a mask.

    Raises CheckpointError for logits of another kind, and for capped ones without a mask.
    """
    for name in OTHER_LOGITS:
        if others.get(name) is not None:
            raise CheckpointError(
                f"{type(module).__name__} attends with {name}, which graphs here do not have; "
                "only models whose attention is softmax of scaled products are supported"
            )
    if softcap and attention_mask is None:
        raise CheckpointError(
            f"{type(module).__name__} attends with softcap without a mask, which graphs here do "
            "not have; only models whose prompts' tokens see one another may have it"
        )
    if (check := _check.get()) is not None:
        check(module)
    causal = attention_mask is None and tap is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if tap is not None:
        tap.query, tap.key, tap.scale, tap.softcap = query, key, scale, float(softcap or 0)
    if causal:
        length = None if tap is None else tap.length
        out, *scores = CAUSAL_ATTENTION(
            query, key, value, length, scale=scale, importance=int(length is not None)
        )
        if tap is not None and scores:
            tap.importance = scores[0]
    elif torch.compiler.is_exporting():
        mask = [] if attention_mask is None else [attention_mask]
        logits = logit_attributes(scale, float(softcap or 0))
        out = _node("Attention", [query, key, value, *mask], logits, query)
    elif softcap and attention_mask is not None:
        out = _capped_attention(query, key, value, attention_mask, scale, softcap)
    else:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scale, enable_gqa=True
        )
    if not causal and tap is not None and tap.length is not None and tap.ends is not None:
        # All logits at once: under a mask the attention itself has them, too
        (tap.importance,) = CACHE_IMPORTANCE(
            query, key, tap.ends, tap.length, **tap.logits, parts=1
        )
    return out.transpose(1, 2), None


def _capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """[B,Hq,N,d]: Attention of ONNX with ``softcap``, which caps logits before it masks them."""
    batch, _, rows, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, rows, width)  # heads that share a key head
    logits = grouped @ key[:, :, None].transpose(3, 4) * scale
    logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask[:, :, None], torch.finfo(logits.dtype).min)
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2)


_check: ContextVar[Callable[[nn.Module], object] | None] = ContextVar("check", default=None)


@contextmanager
def checked_attention(check: Callable[[nn.Module], object]) -> Iterator[None]:
    """Within, ``check`` sees every module that attends, and may refuse it."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def scatter(cache: torch.Tensor, update: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Write ``update`` [B,H,n,d] into ``cache`` [B,H,C,d] from slot ``index`` [B] int64 on."""
    if torch.compiler.is_exporting():
        return _node("TensorScatter", [cache, update, index], {"axis": -2}, cache)
    slots = index[:, None] + torch.arange(update.shape[2], device=index.device)
    where = slots[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])
    return cache.scatter(2, where, update)


def rms_normalization(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``hidden`` over its root mean square, times ``weight``; while tracing only."""
    # stash_type 1: normalised in fp32, cast back, then scaled, as transformers does it.
    attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    return _node("RMSNormalization", [hidden, weight], attributes, hidden)


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key [B,H,N,d] turned by angles [B,N,r], the first r of d; while tracing only."""
    # transformers repeats the angles for both halves of the head; the op wants them once.
    del unsqueeze_dim
    size = cos.shape[-1]
    angles = [cos[..., : size // 2], sin[..., : size // 2]]

    def turned(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] == size:
            return _node("RotaryEmbedding", [x, *angles], {}, x)
        first = x[..., :size]
        return torch.cat([_node("RotaryEmbedding", [first, *angles], {}, first), x[..., size:]], -1)

    return turned(query), turned(key)
