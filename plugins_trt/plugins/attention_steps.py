"""The steps of the kernels in attention_tiles.py, for the plan of either op."""

from __future__ import annotations

from lvlm.plugins_trt.plugins.attention_tiles import column_sums, join_splits, row_sums
from lvlm.plugins_trt.plugins.plugin_plan import PluginStep, Scalar, Scratch
from lvlm.plugins_trt.plugins.sizes import Size, const, extent

BATCH, HEADS, INDICES, WIDTH = (extent("query", axis) for axis in range(4))
KEY_HEADS, POSITIONS = extent("key", 1), extent("key", 2)
GROUP = HEADS // KEY_HEADS
ROWS = GROUP * INDICES  # the heads of a group, under each other

KEYS = 64  # of a tile
DEPTH = 32  # slice of the head size
SPLITS = 32  # of the keys at most, among programs: where rows are too few to keep a GPU busy
MIN_TILES = 4  # of a split
JOINED = 64  # rows of a program

CAP = Scalar("softcap")
SIZES = (KEY_HEADS, ROWS, INDICES, POSITIONS, WIDTH)
# By what a head size leaves over by 8; the second kernel takes any size.
ALIGNED = ("ODD", WIDTH - WIDTH // 8 * 8, (0, 7))


def softmax_steps(
    slots: str, valid: str, block: int, shares: Size, warps: int
) -> tuple[PluginStep, PluginStep, PluginStep]:
    """Steps that leave in ``sums`` the attention of each key head's rows, in ``shares`` parts.

    slots, valid  names of inputs; ``valid`` is "length", or else the ids of the keys
    block, warps  rows of a tile, and what computes one
    """
    blocks = ROWS.ceil_div(block)
    wanted = (const(SPLITS) // blocks.at_least(1)).at_least(1)
    span = POSITIONS.ceil_div(wanted * KEYS).at_least(MIN_TILES) * KEYS
    splits = POSITIONS.at_least(1).ceil_div(span)

    return (
        PluginStep(
            kernel=row_sums,
            grid=(blocks, splits, BATCH * KEY_HEADS),
            arguments=(
                "query",
                "key",
                slots,
                valid,
                "peaks",
                "totals",
                *SIZES,
                span,
                Scalar("scale"),
                CAP,
            ),
            constants=tile_constants(valid, block),
            choice=ALIGNED,
            warps=warps,
            stages=3,
        ),
        PluginStep(
            kernel=join_splits,
            # Nothing to join, no launch.
            grid=(ROWS.ceil_div(JOINED) * (splits - 1).at_most(1), BATCH * KEY_HEADS),
            arguments=("peaks", "totals", ROWS, splits),
            constants={"SPLITS": SPLITS, "BLOCK": JOINED},
        ),
        sums_step(slots, valid, block, shares, warps, splits),
    )


def sums_step(
    slots: str,
    valid: str,
    block: int,
    shares: Size,
    warps: int,
    splits: Size,
    softcap: Scalar | Size = CAP,
) -> PluginStep:
    """The last of ``softmax_steps``: peaks and totals, in so many ``splits``, are known."""
    return PluginStep(
        kernel=column_sums,
        grid=(POSITIONS.ceil_div(KEYS), KEY_HEADS * shares, BATCH),
        arguments=("query", "key", slots, valid, "peaks", "totals", "sums", *SIZES, splits,
                   ROWS // shares, Scalar("scale"), softcap),
        constants=tile_constants(valid, block),
        choice=ALIGNED,
        warps=warps,
        stages=3,
    )  # fmt: skip


def tile_constants(valid: str, block: int) -> dict[str, int | bool]:
    return {"LENGTHS": valid == "length", "BLOCK_R": block, "BLOCK_N": KEYS, "DEPTH": DEPTH}


def softmax_scratch(block: int, shares: Size) -> tuple[Scratch, ...]:
    """Peaks and totals of each row, in as many splits as it may have; sums of each share.

    Splits times rows is the rows themselves where they are many, else at most SPLITS blocks: a
    bound that never shrinks as inputs grow, since an engine reserves memory for its largest only.
    """
    rows = (BATCH * KEY_HEADS, ROWS.at_least(SPLITS * block))
    return (
        Scratch("peaks", "float32", rows),
        Scratch("totals", "float32", rows),
        Scratch("sums", "float32", (BATCH, KEY_HEADS * shares, POSITIONS)),
    )
