"""The plan of ``CacheAttention``: few rows (decode) in one small tile, many (extend, prefill) in
large ones; where they are fewer programs than a GPU wants, keys are shared out among several."""

from __future__ import annotations

from lvlm.export.ops.cache_attention import LARGEST_HEAD
from lvlm.plugins_trt.cache_attention.kernel import attend, join
from lvlm.plugins_trt.plugins.attention_steps import (
    BATCH,
    HEADS,
    INDICES,
    KEY_HEADS,
    POSITIONS,
    ROWS,
    WIDTH,
)
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
from lvlm.plugins_trt.plugins.sizes import Size, const

FEW, MANY = 16, 64  # rows of a tile
PROGRAMS = {FEW: 512, MANY: 256}  # from so many on keys are not shared out
SPLITS = 64  # of a row's keys at most
SHORTEST = 128  # keys of a split
# Head sizes that kernels come in. What one leaves over by 8 makes it larger than any: its rows
# would not be aligned.
HEAD_CHOICE = (
    "BLOCK_D",
    WIDTH + (WIDTH - WIDTH // 8 * 8) * LARGEST_HEAD,
    (LARGEST_HEAD // 2, LARGEST_HEAD),
)

IS_MANY = (ROWS.ceil_div(FEW) - 1).at_most(1)
IS_FEW = const(1) - IS_MANY


def splits_of(block: int) -> Size:
    """Parts that the keys of a row go in."""
    tiles = BATCH * KEY_HEADS * ROWS.ceil_div(block)
    wanted = const(PROGRAMS[block]) // tiles.at_least(1)
    return wanted.at_most(SPLITS).at_most(POSITIONS.ceil_div(SHORTEST)).at_least(1)


def attention_step(block: int, here: Size, warps: int, stages: int) -> PluginStep:
    """The launch with tiles of ``block`` rows, where ``here`` is 1."""
    splits = splits_of(block)
    tensors = ("query", "key", "value", "seen", "seen", "output", "mixed", "peaks", "totals")
    return PluginStep(
        kernel=attend,
        grid=(ROWS.ceil_div(block) * splits * here, KEY_HEADS, BATCH),
        arguments=(*tensors, ROWS, INDICES, POSITIONS, WIDTH, splits, Scalar("window"),
                   Scalar("scale")),
        constants={"BLOCK_R": block, "SHORTEST": SHORTEST, "SLOTS": False},
        choice=HEAD_CHOICE,
        warps=warps,
        stages=stages,
    )  # fmt: skip


SPLIT = splits_of(FEW) * IS_FEW + splits_of(MANY) * IS_MANY
# Rows times splits: programs times rows of a tile, and never more; nothing without splits.
PARTS = (BATCH * HEADS * INDICES * SPLITS).at_most(max(n * rows for rows, n in PROGRAMS.items()))

PLUGIN = Plugin(
    name="CacheAttention",
    inputs=(
        PluginInput("query", DATA, (4,)),
        PluginInput("key", DATA, (4,)),
        PluginInput("value", DATA, (4,)),
        PluginInput("seen", "int64", (1,)),
    ),
    outputs=(Output("output", DATA, (BATCH, HEADS, INDICES, WIDTH)),),
    attributes=(Attribute("scale", float), Attribute("window", int, 0, minimum=0)),
    scratch=(
        Scratch("mixed", "float32", (PARTS, WIDTH)),
        Scratch("peaks", "float32", (PARTS,)),
        Scratch("totals", "float32", (PARTS,)),
    ),
    steps=(
        attention_step(FEW, IS_FEW, warps=4, stages=3),
        attention_step(MANY, IS_MANY, warps=4, stages=2),
        PluginStep(
            kernel=join,
            # Nothing to join, no launch.
            grid=(ROWS * (SPLIT - 1).at_most(1), KEY_HEADS, BATCH),
            arguments=("mixed", "peaks", "totals", "output", ROWS, WIDTH, SPLIT),
            constants={"SPLITS": SPLITS},
            choice=HEAD_CHOICE,
        ),
    ),
)
