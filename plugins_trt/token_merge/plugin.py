"""The plan of ``lvlm::TokenMerge``: contract in export/ops/token_merge/, kernels in kernel.py,
absorb.py and share.py.

Scratch is 16 + 8 PARTS bytes for each of the B N tokens, 4 for each of the B Nout output slots and
12 for each of the B M K centre numbers: under 1 % of the hidden states, if those are 4,096 wide and
fp16. Nothing as large as tokens times centres exists but with merge=illava, whose centres are few.
"""

from __future__ import annotations

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
from lvlm.plugins_trt.plugins.sizes import Size, const, extent, numel
from lvlm.plugins_trt.token_merge import absorb, kernel, share

BATCH, LENGTH, WIDTH = (extent("hidden", axis) for axis in range(3))
IMAGES, SLOTS = extent("keep", 1), extent("keep_slots", 0)
NEW_LENGTH = extent("out_slots", 0)
NUMBERS = IMAGES * SLOTS  # of centres, in one row
CENTRES = extent("recycle_slots", 0)  # of one image, at most
LEADS = numel("positions") // numel("image_id").at_least(1)

PARTS = 4  # a few loose tokens against a few centres would leave most of a GPU idle
COUNTING = {"BLOCK_I": 128, "BLOCK_J": 256}
# A kernel of its own for widths that are no multiple of 8, whose rows do not start at 16 bytes.
ODD = ("ODD", WIDTH - WIDTH // 8 * 8, (0, 7))


def _blocks(number: Size, block: int) -> Size:
    return number.ceil_div(block)


def _layout(centre_count: str, *rules: str) -> PluginStep:
    """``centre_count``: the input that says how many centres each image has."""
    return PluginStep(
        kernel.layout,
        (BATCH,),
        ("image_id", "keep", centre_count, "rank", "map", "origin", "centres", "loose",
         "loose_count", LENGTH, IMAGES, SLOTS, NEW_LENGTH),
        {"BLOCK": 1024},
        when=rules,
    )  # fmt: skip


def _absorb(
    rule: str, centre_count: str, limit: Size | Scalar, max_centres: Size, tile: dict[str, int]
) -> tuple[PluginStep, ...]:
    """The steps of a rule in which a centre absorbs at most ``limit`` tokens.

    max_centres  of an image; tile  loose tokens against centres
    """
    return (
        PluginStep(
            absorb.norms,
            (_blocks(LENGTH, 16), BATCH),
            ("hidden", "image_id", "norm", LENGTH, WIDTH),
            {"BLOCK_T": 16, "BLOCK_D": 256},
            choice=ODD,
            when=(rule,),
        ),
        PluginStep(
            absorb.candidates,
            (_blocks(LENGTH, tile["BLOCK_T"]), const(PARTS), BATCH),
            ("hidden", "image_id", "norm", centre_count, "centres", "loose", "loose_count",
             "cosine", "owner", LENGTH, IMAGES, SLOTS, WIDTH),
            tile,
            choice=ODD,
            when=(rule,),
        ),
        PluginStep(
            absorb.closest,
            (_blocks(LENGTH, 256), BATCH),
            ("cosine", "owner", "loose_count", LENGTH),
            {"PARTS": PARTS, "BLOCK": 256},
            when=(rule,),
        ),
        PluginStep(
            absorb.group,
            (_blocks(LENGTH, COUNTING["BLOCK_I"]), BATCH),
            ("cosine", "owner", "centres", "loose", "loose_count", "grouped", "begin", "absorbed",
             "map", LENGTH, NUMBERS, limit),
            COUNTING,
            warps=16,
            when=(rule,),
        ),
        PluginStep(
            absorb.means,
            (IMAGES * max_centres, _blocks(WIDTH, 512), BATCH),
            ("hidden", "importance", "centres", "grouped", "begin", "absorbed", "map", "merged",
             LENGTH, SLOTS, NUMBERS, NEW_LENGTH, WIDTH, max_centres),
            {"BLOCK_E": 8, "BLOCK_D": 512},
            choice=ODD,
            when=(rule,),
        ),
    )  # fmt: skip


def _share() -> tuple[PluginStep, ...]:
    """The steps of merge=illava."""
    return (
        PluginStep(
            share.dot_products,
            (_blocks(LENGTH, 16), IMAGES, BATCH),
            ("hidden", "image_id", "recycle", "centres", "loose", "loose_count", "product",
             LENGTH, IMAGES, SLOTS, WIDTH, CENTRES),
            {"BLOCK_T": 16, "BLOCK_C": 16, "BLOCK_D": 64},
            choice=ODD,
            when=("illava",),
        ),
        PluginStep(
            share.choose,
            (IMAGES * CENTRES, BATCH),
            ("recycle", "loose_count", "product", "best", "lowest", "last", LENGTH, IMAGES, SLOTS,
             CENTRES, Scalar("absorb")),
            {"BLOCK": 512},
            when=("illava",),
        ),
        PluginStep(
            share.claim,
            (_blocks(LENGTH, 128), BATCH),
            ("image_id", "recycle", "centres", "loose", "loose_count", "product", "lowest", "last",
             "map", LENGTH, IMAGES, SLOTS, CENTRES),
            {"BLOCK": 128},
            when=("illava",),
        ),
        PluginStep(
            share.halves,
            (IMAGES * CENTRES, _blocks(WIDTH, 512), BATCH),
            ("hidden", "recycle", "centres", "loose", "loose_count", "product", "best", "lowest",
             "last", "map", "merged", LENGTH, IMAGES, SLOTS, NEW_LENGTH, WIDTH, CENTRES),
            {"BLOCK_E": 8, "BLOCK_D": 512},
            choice=ODD,
            when=("illava",),
        ),
    )  # fmt: skip


PLUGIN = Plugin(
    name="TokenMerge",
    inputs=(
        PluginInput("hidden", DATA, (3,)),
        PluginInput("importance", "float32", (2,)),
        PluginInput("image_id", "int64", (2,)),
        PluginInput("positions", "int64", (2, 3)),
        PluginInput("keep", "int64", (2,)),
        PluginInput("keep_slots", "int64", (1,)),
        PluginInput("out_slots", "int64", (1,)),
        PluginInput("recycle", "int64", (2,), optional=True),
        PluginInput("recycle_slots", "int64", (1,), optional=True),
    ),
    outputs=(
        Output("merged", DATA, (BATCH, NEW_LENGTH, WIDTH)),
        Output("merged_positions", "int64", (NEW_LENGTH,), lead="positions"),
        Output("merged_image_id", "int64", (BATCH, NEW_LENGTH)),
        Output("map", "int64", (BATCH, LENGTH)),
    ),
    attributes=(
        Attribute("merge", str, "recycle", choices=("recycle", "nearest", "illava", "drop")),
        Attribute("absorb", int, 5, minimum=1),
    ),
    variant="merge",
    needs=dict.fromkeys(("recycle", "illava"), ("recycle", "recycle_slots")),
    scratch=(
        Scratch("rank", "int32", (BATCH, LENGTH)),
        Scratch("origin", "int32", (BATCH, NEW_LENGTH)),
        Scratch("centres", "int32", (BATCH, NUMBERS)),
        Scratch("begin", "int32", (BATCH, NUMBERS)),
        Scratch("absorbed", "int32", (BATCH, NUMBERS)),
        Scratch("loose", "int32", (BATCH, LENGTH)),
        Scratch("loose_count", "int32", (BATCH,)),
        Scratch("grouped", "int32", (BATCH, LENGTH)),
        Scratch("norm", "float32", (BATCH, LENGTH)),
        Scratch("cosine", "float32", (const(PARTS), BATCH, LENGTH)),
        Scratch("owner", "int32", (const(PARTS), BATCH, LENGTH)),
        *(
            Scratch(name, dtype, (BATCH, IMAGES * CENTRES, *line), when=("illava",))
            for name, dtype, line in (
                ("product", "float32", (LENGTH,)),
                ("best", "float32", ()),
                ("lowest", "float32", ()),
                ("last", "int32", ()),
            )
        ),
    ),
    steps=(
        PluginStep(
            kernel.rank,
            (_blocks(LENGTH, COUNTING["BLOCK_I"]), BATCH),
            ("importance", "image_id", "rank", "centres", "absorbed", LENGTH, NUMBERS),
            {**COUNTING, "BLOCK": 2048},
            warps=16,
        ),
        _layout("recycle", "recycle", "illava"),
        _layout("keep", "nearest", "drop"),
        PluginStep(
            kernel.copy,
            (_blocks(NEW_LENGTH, 16), _blocks(WIDTH, 256), BATCH),
            ("hidden", "positions", "image_id", "origin", "merged", "merged_positions",
             "merged_image_id", LENGTH, NEW_LENGTH, WIDTH, LEADS),
            {"BLOCK_S": 16, "BLOCK_D": 256},
            choice=ODD,
        ),
        *_absorb(
            "recycle",
            "recycle",
            limit=Scalar("absorb"),
            max_centres=CENTRES,
            tile={"BLOCK_T": 16, "BLOCK_C": 32, "BLOCK_D": 64},
        ),
        *_absorb(
            "nearest",
            "keep",
            limit=LENGTH,
            max_centres=SLOTS,
            tile={"BLOCK_T": 32, "BLOCK_C": 64, "BLOCK_D": 32},
        ),
        *_share(),
    ),
)  # fmt: skip
