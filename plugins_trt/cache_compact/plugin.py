"""The plan of ``CacheCompact``. The mode merge-reference is for parity tests and has no kernel."""

from __future__ import annotations

from lvlm.plugins_trt.cache_compact.kernel import (
    copy_survivors,
    list_survivors,
    mark_survivors,
    merge_into_survivors,
    order_scores,
)
from lvlm.plugins_trt.plugins.plugin_plan import (
    DATA,
    HEAD_BLOCKS,
    Attribute,
    Output,
    Plugin,
    PluginInput,
    PluginStep,
    Scalar,
    Scratch,
)
from lvlm.plugins_trt.plugins.sizes import extent

BATCH, HEADS, POSITIONS = extent("key", 0), extent("key", 1), extent("key", 2)
SLOTS = extent("slots", 0)

# Positions or slots of a program; what there is to spare of registers decides.
ORDERED = 1024
RANKED, COMPARED = 16, 1024  # ranked, and compared with at a time
LISTED = 2048  # at a time
COPIED = 16
MERGED, ROWS = 16, 4  # ROWS of each slot at a time


def _copy(states: str) -> PluginStep:
    width = extent(states, 3)
    return PluginStep(
        kernel=copy_survivors,
        grid=(SLOTS.ceil_div(COPIED), HEADS, BATCH),
        arguments=(states, "kept_index", f"compact_{states}", POSITIONS, SLOTS, width),
        constants={"SLOTS": COPIED},
        choice=("BLOCK_D", width, HEAD_BLOCKS),
        when=("evict",),
    )


def _merge(states: str) -> PluginStep:
    width = extent(states, 3)
    return PluginStep(
        kernel=merge_into_survivors,
        grid=(SLOTS.ceil_div(MERGED), HEADS, BATCH),
        arguments=(states, "length", "kept_index", f"compact_{states}", POSITIONS, SLOTS, width),
        constants={"SLOTS": MERGED, "ROWS": ROWS},
        choice=("BLOCK_D", width, HEAD_BLOCKS),
        when=("merge",),
        warps=8,
    )


PLUGIN = Plugin(
    name="CacheCompact",
    inputs=(
        PluginInput("key", DATA, (4,)),
        PluginInput("value", DATA, (4,)),
        PluginInput("importance", "float32", (2,)),
        PluginInput("length", "int64", (1,)),
        PluginInput("budget", "int64", (1,)),
        PluginInput("slots", "int64", (1,)),
    ),
    outputs=(
        Output("compact_key", DATA, (BATCH, HEADS, SLOTS, extent("key", 3))),
        Output("compact_value", DATA, (BATCH, HEADS, SLOTS, extent("value", 3))),
        Output("kept_index", "int64", (BATCH, SLOTS)),
        Output("kept", "int64", (BATCH,)),
    ),
    attributes=(
        Attribute("mode", str, "evict", choices=("evict", "merge")),
        Attribute("sinks", int, 1, minimum=0),
        Attribute("recent", int, 1, minimum=0),
    ),
    variant="mode",
    scratch=(
        Scratch("order", "int32", (BATCH, POSITIONS)),
        Scratch("stays", "int8", (BATCH, POSITIONS)),
    ),
    steps=(
        PluginStep(
            kernel=order_scores,
            grid=(POSITIONS.ceil_div(ORDERED), BATCH),
            arguments=(
                *("importance", "length", "order", POSITIONS),
                *(Scalar("sinks"), Scalar("recent")),
            ),
            constants={"BLOCK": ORDERED},
        ),
        PluginStep(
            kernel=mark_survivors,
            grid=(POSITIONS.ceil_div(RANKED), BATCH),
            arguments=("order", "length", "budget", "stays", POSITIONS),
            constants={"BLOCK_I": RANKED, "BLOCK_J": COMPARED},
            warps=8,
        ),
        PluginStep(
            kernel=list_survivors,
            grid=(BATCH,),
            arguments=(
                *("importance", "length", "budget", "stays", "kept_index", "kept"),
                *(POSITIONS, SLOTS),
            ),
            constants={"BLOCK": LISTED},
            warps=8,
        ),
        _copy("key"),
        _copy("value"),
        _merge("key"),
        _merge("value"),
    ),
)
