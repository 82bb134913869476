"""Inputs of an op whose shapes do not fit: ParameterError, in one line."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lvlm.core.errors import ParameterError


def check_ranks(
    op: str, inputs: Iterable[tuple[str, torch.Tensor | None, tuple[int, ...]]]
) -> None:
    """Each input by name with the ranks that it may have; None: it is left out."""
    for name, tensor, ranks in inputs:
        if tensor is not None and tensor.dim() not in ranks:
            raise ParameterError(f"{op}: {name} has shape {tuple(tensor.shape)}")


def check_heads(op: str, query: torch.Tensor, key: torch.Tensor) -> None:
    """Queries of grouped heads [B, Hq, R, d] beside keys [B, Hkv, N, d]."""
    if query.dim() != 4 or key.dim() != 4 or query.shape[3] != key.shape[3]:
        raise ParameterError(
            f"{op}: query [B, Hq, R, d] and key [B, Hkv, N, d] do not fit: "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    if query.shape[1] % key.shape[1]:
        raise ParameterError(
            f"{op}: {query.shape[1]} query heads are no multiple of {key.shape[1]} key heads"
        )


def check_softcap(op: str, softcap: float) -> None:
    """A cap of attention's logits; 0: none."""
    if softcap < 0:
        raise ParameterError(f"{op}: softcap is {softcap}, at least 0 is needed")
