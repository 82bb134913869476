"""The plan of ``TokenImportance``."""

from __future__ import annotations

from lvlm.plugins_trt.plugins.attention_steps import (
    BATCH,
    HEADS,
    INDICES,
    KEY_HEADS,
    POSITIONS,
    softmax_scratch,
    softmax_steps,
)
from lvlm.plugins_trt.plugins.plugin_plan import (
    DATA,
    Attribute,
    Output,
    Plugin,
    PluginInput,
    PluginStep,
)
from lvlm.plugins_trt.plugins.sizes import const
from lvlm.plugins_trt.token_importance.kernel import mean_over_rows

ROWS = 16  # of a tile: a group's heads, of few queries
ADDED = 256  # positions of a program

PLUGIN = Plugin(
    name="TokenImportance",
    inputs=(
        PluginInput("query", DATA, (4,)),
        PluginInput("key", DATA, (4,)),
        PluginInput("query_index", "int64", (2,)),
        PluginInput("image_id", "int64", (2,)),
    ),
    outputs=(Output("importance", "float32", (BATCH, POSITIONS)),),
    attributes=(Attribute("scale", float), Attribute("softcap", float, 0.0)),
    scratch=softmax_scratch(ROWS, const(1)),
    steps=(
        *softmax_steps("query_index", "image_id", ROWS, const(1), warps=4),
        PluginStep(
            kernel=mean_over_rows,
            grid=(POSITIONS.ceil_div(ADDED), BATCH),
            arguments=(
                *("sums", "query_index", "importance"),
                *(HEADS, KEY_HEADS, INDICES, POSITIONS),
            ),
            constants={"BLOCK": ADDED},
        ),
    ),
)
