"""The plan of ``CacheUpdate``: in place, so that only what is new is written."""

from __future__ import annotations

from lvlm.plugins_trt.cache_update.kernel import write_entries
from lvlm.plugins_trt.plugins.plugin_plan import DATA, Output, Plugin, PluginInput, PluginStep
from lvlm.plugins_trt.plugins.sizes import extent

BATCH, HEADS, EXTENT, WIDTH = (extent("cache", axis) for axis in range(4))
ENTRIES = extent("update", 2)

WRITTEN = 1024  # numbers of a program

PLUGIN = Plugin(
    name="CacheUpdate",
    inputs=(
        PluginInput("cache", DATA, (4,)),
        PluginInput("update", DATA, (4,)),
        PluginInput("index", "int64", (1,)),
    ),
    outputs=(Output("updated", DATA, (BATCH, HEADS, EXTENT, WIDTH), alias="cache"),),
    steps=(
        PluginStep(
            kernel=write_entries,
            grid=((HEADS * ENTRIES * WIDTH).ceil_div(WRITTEN), BATCH),
            arguments=("update", "index", "updated", EXTENT, HEADS, ENTRIES, WIDTH),
            constants={"BLOCK": WRITTEN},
        ),
    ),
)
