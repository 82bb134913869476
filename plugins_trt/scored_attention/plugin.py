"""The plan of ``ScoredAttention``: attention, whose denominators the sums of CacheImportance need;
so the logits are computed twice, not three times."""

from __future__ import annotations

from lvlm.plugins_trt.cache_attention.kernel import attend
from lvlm.plugins_trt.cache_attention.plugin import HEAD_CHOICE, MANY, SHORTEST
from lvlm.plugins_trt.cache_importance.plugin import mean_step
from lvlm.plugins_trt.plugins.attention_steps import (
    BATCH,
    GROUP,
    HEADS,
    INDICES,
    KEY_HEADS,
    POSITIONS,
    ROWS,
    WIDTH,
    sums_step,
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
from lvlm.plugins_trt.plugins.sizes import const

INPUTS = ("query", "key", "value", "query_slot", "length")
ALL_ROWS = (BATCH * KEY_HEADS, ROWS)

PLUGIN = Plugin(
    name="ScoredAttention",
    inputs=(
        *(PluginInput(name, DATA, (4,)) for name in INPUTS[:3]),
        PluginInput("query_slot", "int64", (2,)),
        PluginInput("length", "int64", (1,)),
    ),
    outputs=(
        Output("output", DATA, (BATCH, HEADS, INDICES, WIDTH)),
        Output("importance", "float32", (BATCH, POSITIONS)),
    ),
    attributes=(Attribute("scale", float),),
    scratch=(
        Scratch("peaks", "float32", ALL_ROWS),
        Scratch("totals", "float32", ALL_ROWS),
        Scratch("sums", "float32", (BATCH, HEADS, POSITIONS)),
    ),
    steps=(
        PluginStep(
            kernel=attend,
            grid=(ROWS.ceil_div(MANY), KEY_HEADS, BATCH),
            # One split, no window; of partial results there are none, so anything stands for them.
            arguments=(*INPUTS, "output", "peaks", "peaks", "totals", ROWS, INDICES, POSITIONS,
                       WIDTH, const(1), const(0), Scalar("scale")),
            constants={"BLOCK_R": MANY, "SHORTEST": SHORTEST, "SLOTS": True},
            choice=HEAD_CHOICE,
        ),
        # Logits are not capped: that of models that do so is no plugin
        sums_step("query_slot", "length", MANY, GROUP, warps=8, splits=const(1), softcap=const(0)),
        mean_step(),
    ),
)  # fmt: skip
