"""The form of int8 cache entries: whole numbers from -127 to 127 and one byte, their scale.

Steps are powers of 2 ^ (1/8), the smallest that holds an entry's largest number: coarser than the
exact quotient by 4 % on average, and then what an entry says of itself gives the same entry again
when it is stored once more (RANGE: half a number of slack). All arithmetic is in fp32 by tables, so
that torch, standard ops and kernels give the same bytes.

The last step is NaN: that of an entry with a number that is not finite, or larger than the step
before holds. So attention over it is not finite, as over a cache of floats, and is noticed.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch

from lvlm.export.ops.parts.body import Body, Value

LOWEST, HIGHEST = -128, 127  # scales
RANGE = 127.49  # numbers round to at most 127
STEPS = (2.0 ** (np.arange(LOWEST, HIGHEST + 1) / 8)).astype(np.float32)
PER_STEP = (2.0 ** (-np.arange(LOWEST, HIGHEST + 1) / 8)).astype(np.float32)
STEPS[-1], PER_STEP[-1] = np.nan, 0  # its numbers are 0
LARGEST, BEYOND = STEPS[-2], len(STEPS) - 1  # step; and the place of NaN
OF_LARGEST = np.float32(1 / RANGE)


def quantized(x: torch.Tensor) -> torch.Tensor:
    """Entries [..., d] of floats as int8 [..., d + 1]."""
    x = x.float()
    least = x.abs().amax(-1, keepdim=True) * float(OF_LARGEST)
    place = torch.searchsorted(_table(STEPS[:-1], x), least.contiguous())
    place = torch.where(least <= float(LARGEST), place, BEYOND)
    scaled = x * _table(PER_STEP, x)[place]
    numbers = scaled.nan_to_num(0).round().clamp(-127, 127)
    return torch.cat([numbers, place + LOWEST], dim=-1).to(torch.int8)


def dequantized(entries: torch.Tensor) -> torch.Tensor:
    """Int8 entries [..., d + 1] as floats [..., d], in fp32."""
    place = entries[..., -1:].long() - LOWEST
    return entries[..., :-1].float() * _table(STEPS, entries)[place]


def _table(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device)


def quantize(g: Body, x: Value) -> Value:
    """``quantized`` as standard ops."""
    x = g.Cast(x, to=onnx.TensorProto.FLOAT)
    fp32 = np.float32
    axis, top = g.const([-1]), g.const(LARGEST, fp32)
    least = g.Mul(g.ReduceMax(g.Abs(x), axis, keepdims=1), g.const(OF_LARGEST, fp32))
    # A maximum may pass NaN by; a sum does not
    least = g.Add(least, g.ReduceSum(g.Mul(x, g.const(0, fp32)), axis, keepdims=1))
    fits = g.LessOrEqual(least, top)
    least = g.Where(fits, least, top)
    # A logarithm may be off by one step either way; the table says by which.
    guess = g.Ceil(g.Mul(g.Log(least), g.const(8 / np.log(2), fp32)))
    guess = g.Clip(guess, g.const(LOWEST, fp32), g.const(HIGHEST, fp32))
    place = g.Sub(g.Cast(guess, to=onnx.TensorProto.INT64), g.const(LOWEST))
    steps, last = g.const(STEPS, fp32), g.const(BEYOND - 1)
    more = g.Less(g.Gather(steps, place), least)
    place = g.Min(g.Add(place, g.Cast(more, to=onnx.TensorProto.INT64)), last)
    below = g.Max(g.Sub(place, g.const(1)), g.const(0))
    fewer = g.And(g.GreaterOrEqual(g.Gather(steps, below), least), g.Greater(place, g.const(0)))
    place = g.Sub(place, g.Cast(fewer, to=onnx.TensorProto.INT64))
    place = g.Where(fits, place, g.const(BEYOND))
    scaled = g.Mul(x, g.Gather(g.const(PER_STEP, fp32), place))
    scaled = g.Where(g.IsNaN(scaled), g.const(0, fp32), scaled)
    numbers = g.Clip(g.Round(scaled), g.const(-127, fp32), g.const(127, fp32))
    scale = g.Add(place, g.const(LOWEST))
    parts = (g.Cast(part, to=onnx.TensorProto.INT8) for part in (numbers, scale))
    return g.Concat(*parts, axis=-1)


def dequantize(g: Body, entries: Value) -> Value:
    """``dequantized`` in fp32 as standard ops."""
    axis, end = g.const([-1]), g.const([np.iinfo(np.int64).max])
    numbers = g.Cast(g.Slice(entries, g.const([0]), axis, axis), to=onnx.TensorProto.FLOAT)
    scale = g.Cast(g.Slice(entries, axis, end, axis), to=onnx.TensorProto.INT64)
    step = g.Gather(g.const(STEPS, np.float32), g.Sub(scale, g.const(LOWEST)))
    return g.Mul(numbers, step)
