"""A small plugin that has one of everything a plan may have: an optional input, a variant, scratch
memory, an aliased output, attributes of every kind, a choice of blocks.

``rows[i]`` becomes ``source[index[i]]`` times ``factor`` (and ``weight[i]``, where weighted), and
``total`` in place the sum over rows of ``bias`` plus itself.
"""

# Triton reads upper case as compile-time constants, and mypy nothing of its types.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from lvlm.plugins_trt.plugins.plugin_plan import (
    DATA,
    Attribute,
    Output,
    Plugin,
    PluginInput,
    PluginStep,
    Scalar,
    Scratch,
)
from lvlm.plugins_trt.plugins.sizes import const, extent, numel


@triton.jit
def gather(
    source: tl.tensor,
    index: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    factor: tl.tensor,
    BLOCK_D: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    mask = column < width
    taken = tl.load(source + tl.load(index + row) * width + column, mask=mask, other=0.0)
    tl.store(rows + row * width + column, (taken.to(tl.float32) * factor).to(taken.dtype), mask)


@triton.jit
def scale(rows: tl.tensor, weight: tl.tensor, width: tl.tensor, BLOCK_D: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    place = rows + row * width + column
    value = tl.load(place, mask=column < width, other=0.0)
    scaled = value.to(tl.float32) * tl.load(weight + row)
    tl.store(place, scaled.to(value.dtype), mask=column < width)


@triton.jit
def count_up(bias: tl.tensor, counted: tl.tensor, numbers: tl.tensor, BLOCK: tl.constexpr) -> None:
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(bias + place, mask=place < numbers, other=0.0)
    tl.store(counted + place, value + 1, mask=place < numbers)


@triton.jit
def add(
    counted: tl.tensor,
    total: tl.tensor,
    numbers: tl.tensor,
    times: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(counted + place, mask=place < numbers, other=0.0)
    before = tl.load(total + place, mask=place < numbers, other=0.0)
    tl.store(total + place, before + value * times, mask=place < numbers)


COUNT, WIDTH = extent("index", 0), extent("source", -1)
BLOCK = 64
NUMBERS = numel("bias")

EXAMPLE = Plugin(
    name="Example",
    inputs=(
        PluginInput("source", DATA, (2,)),
        PluginInput("index", "int64", (1,)),
        PluginInput("bias", "float32", (1, 2, 3)),
        PluginInput("weight", "float32", (1,), optional=True),
    ),
    outputs=(
        Output("rows", DATA, (COUNT, WIDTH)),
        Output("total", "float32", (extent("bias", -1),), lead="bias", alias="bias"),
    ),
    attributes=(
        Attribute("mode", str, "plain", choices=("plain", "weighted")),
        Attribute("factor", float),
        Attribute("times", int, 2, minimum=-3),
        Attribute("note", str, "", unused=True),
    ),
    variant="mode",
    needs={"weighted": ("weight",)},
    scratch=(
        Scratch("unused", "int8", ((COUNT + 1) * 3,)),
        Scratch("counted", "float32", (NUMBERS.at_least(COUNT).at_most(1 << 20),)),
        Scratch("copy", DATA, (COUNT.ceil_div(2), WIDTH // 3)),
    ),
    steps=(
        PluginStep(
            kernel=gather,
            grid=(COUNT,),
            arguments=("source", "index", "rows", WIDTH, Scalar("factor")),
            choice=("BLOCK_D", WIDTH, (16, 64)),
        ),
        PluginStep(
            kernel=scale,
            grid=(COUNT, const(1)),
            arguments=("rows", "weight", WIDTH),
            constants={"BLOCK_D": 64},
            when=("weighted",),
            warps=1,
        ),
        PluginStep(
            kernel=count_up,
            grid=(NUMBERS.ceil_div(BLOCK),),
            arguments=("bias", "counted", NUMBERS),
            constants={"BLOCK": BLOCK},
        ),
        PluginStep(
            kernel=add,
            grid=(NUMBERS.ceil_div(BLOCK),),
            arguments=("counted", "total", NUMBERS, Scalar("times")),
            constants={"BLOCK": BLOCK},
        ),
    ),
)
