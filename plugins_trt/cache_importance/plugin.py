"""The plan of ``CacheImportance``. Kernels hold no chunk of queries: chunk and parts are unused."""

from __future__ import annotations

from lvlm.plugins_trt.cache_importance.kernel import mean_over_heads
from lvlm.plugins_trt.plugins.attention_steps import (
    BATCH,
    GROUP,
    HEADS,
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

ROWS = 64  # of a tile
ADDED = 256  # positions of a program


def mean_step() -> PluginStep:
    """``importance`` from the ``sums`` of each head."""
    return PluginStep(
        kernel=mean_over_heads,
        grid=(POSITIONS.ceil_div(ADDED), BATCH),
        arguments=("sums", "importance", HEADS, POSITIONS),
        constants={"BLOCK": ADDED},
    )


PLUGIN = Plugin(
    name="CacheImportance",
    inputs=(
        PluginInput("query", DATA, (4,)),
        PluginInput("key", DATA, (4,)),
        PluginInput("query_slot", "int64", (2,)),
        PluginInput("length", "int64", (1,)),
    ),
    outputs=(Output("importance", "float32", (BATCH, POSITIONS)),),
    attributes=(
        Attribute("scale", float),
        Attribute("softcap", float, 0.0),
        Attribute("chunk", int, 128, unused=True, minimum=1),
        Attribute("parts", int, 0, unused=True, minimum=0),
    ),
    scratch=softmax_scratch(ROWS, GROUP),
    steps=(
        *softmax_steps("query_slot", "length", ROWS, GROUP, warps=8),
        mean_step(),
    ),
)
