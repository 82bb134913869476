"""Entries between what graphs compute in and what cache buffers hold: floats of the same or lower
precision, or 8 bits with a scale (ops/cache_quantize.py)."""

from __future__ import annotations

import torch

from lvlm.export.ops.cache_dequantize import OP as CACHE_DEQUANTIZE
from lvlm.export.ops.cache_quantize import OP as CACHE_QUANTIZE
from lvlm.export.standard_ops import scatter
from lvlm.runtime.bundle.entry_form import entry_width, side_dtype


def held_width(head_dim: int, dtype: torch.dtype) -> int:
    """Numbers of a head's entry in a buffer of ``dtype``."""
    return entry_width(head_dim, _name(dtype))


def dtype_beside(dtype: torch.dtype) -> torch.dtype:
    """The type of rings of queries and of states beside entries of ``dtype``."""
    found = getattr(torch, side_dtype(_name(dtype)))
    assert isinstance(found, torch.dtype)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_held(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` [B,H,n,d] as a buffer of ``dtype`` holds it; what is held so already, as it is."""
    if dtype == torch.int8 and x.dtype != torch.int8:
        (entries,) = CACHE_QUANTIZE(x)
        return entries
    return x.to(dtype)


def as_computed(held: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A buffer's content in the ``dtype`` that is computed in."""
    if held.dtype == torch.int8:
        (held,) = CACHE_DEQUANTIZE(held)
    return held.to(dtype)


def store(buffer: torch.Tensor, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x`` [B,H,n,d], as the buffer holds it, into ``buffer`` [B,H,C,d] from slot ``index`` on."""
    return scatter(buffer, as_held(x, buffer.dtype), index)
