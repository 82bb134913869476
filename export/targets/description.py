"""Description of a target: one engine, of one version on one platform, as data.

``passes/lowering.py`` turns a description into graphs, ``lvlm-build engine`` into engines. Where
NVIDIA's documentation is all that is known, ``verified`` is empty and every operator that is in
doubt is decomposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Flavour = Literal["tensorrt", "tensorrt-rtx", "onnxruntime", "openvino"]

# Standard ops that came with opsets 23 and 24, as our graphs hold them; Attention has data types.
NEW_OPS = frozenset({"RMSNormalization", "RotaryEmbedding", "TensorScatter"})
FLOATS = frozenset({"float32", "float16", "bfloat16"})
HALVES = frozenset({"float16", "bfloat16"})

# Bytes of weights above which a validation runs no engine that makes its own copy of them
LARGE = 2_000_000_000
# Metadata of a decode graph: how many positions its tokens can have; that every new entry goes to
# slot valid_length - 1
POSITIONS = "lvlm.positions"
CACHE_WRITES, AT_THE_END = "lvlm.cache_writes", "end"


@dataclass(frozen=True)
class SignedWeights:
    """Quantized weights as TensorRT's DequantizeLinear takes them of constants, so that they stay
    packed in an engine: signed numbers without zero points.

    blocks           by the bits of a number, how many inputs of an output may share a scale; None:
                     all of them
    negative_scales  bits of the numbers whose scales may be below zero, or zero
    """

    blocks: Mapping[int, tuple[int | None, ...]] = field(hash=False)
    negative_scales: tuple[int, ...] = ()

    def whole(self, bits: int, block: int) -> bool:
        """True where scales of blocks must be alike for all of an output, and become one."""
        return block not in self.blocks.get(bits, ())

    def positive(self, bits: int) -> bool:
        """True where no scale may be below zero, or zero."""
        return bits not in self.negative_scales


# Seen on TensorRT-RTX's builder: blocks of int8 are spread in memory, those of all layers at once
PACKED: Mapping[int, tuple[int | None, ...]] = {4: (16, 32, 64, 128, 256), 8: (None,)}


@dataclass(frozen=True)
class Description:
    """Description of a target: what its engine takes.

    flavour       the package that runs it: of TensorRT's, engines that it builds; of the others,
                  graphs as they are written
    version       of that package, as many parts as must agree
    platform      the machines it is for
    sms           their architectures, compute capabilities without the dot; (): any
    opset         newest one its parser takes
    imports       those of NEW_OPS that it takes; the others are decomposed
    attention     data types in which it takes Attention; in others that is decomposed or, where it
                  is causal and lvlm ops are plugins, CacheAttention
    row_heads     fewest heads with which it takes Attention of one query row
    matmul_types  data types in which it multiplies matrices: those a bundle for it can be in
    plugins       lvlm ops are plugins, which their functions must not stand in for
    valid_only    attention over a cache is CacheAttention, a plugin that reads what is valid alone,
                  also in types in which it takes Attention
    static_cache  the length of the cache is fixed in the graph
    topk_limit    largest K of its TopK; None: no limit is known
    low_precision takes quantized weights as the canonical graphs have them, and a cache of
                  lower precision than is computed in
    signed        the quantized weights that it takes in another form; None: none
    verified      what was seen; "": nothing, the entry follows the documentation
    """

    name: str
    summary: str
    flavour: Flavour
    version: tuple[int, ...]
    platform: str
    sms: tuple[int, ...]
    opset: int
    imports: frozenset[str]
    attention: frozenset[str]
    matmul_types: frozenset[str]
    plugins: bool
    static_cache: bool
    topk_limit: int | None
    verified: str
    low_precision: bool = False
    signed: SignedWeights | None = None
    row_heads: int = 1
    valid_only: bool = False

    @property
    def built(self) -> bool:
        """Engines are built from the graphs."""
        return self.flavour.startswith("tensorrt")

    def file(self, file: str) -> str:
        """Name of the lowered form of a graph's file."""
        return target_file(file, self.name)

    @property
    def weights_file(self) -> str:
        """Name of the file of weights that its lowered graphs alone read."""
        return f"weights.{self.name}.bin"

    def refusal(self, bits: int, block: int, *, whole: bool) -> str | None:
        """The reason why it does not take weights of ``bits`` bits whose scales are of ``block``
        inputs, or of all of an output (``whole``), and what to export instead; None: it does."""
        taken = {} if self.signed is None else self.signed.blocks
        blocks = taken.get(bits, ())
        if self.low_precision or block in blocks or (whole and None in blocks):
            return None
        if not blocks:
            others = [f"--weights int{n}{_block_size(sizes)}" for n, sizes in taken.items()]
            mend = " or ".join([*others, "no quantized weights"])
            return f"target {self.name} does not take int{bits} weights; export with {mend}"
        whole_only = None in blocks
        sizes = "one scale for each output" if whole_only else f"blocks of {_list(blocks)}"
        return (
            f"target {self.name} takes int{bits} weights with {sizes} only, not blocks of {block}; "
            f"export with --block-size {'all' if whole_only else blocks[0]}"
        )


def _list(blocks: tuple[int | None, ...]) -> str:
    return ", ".join(map(str, blocks))


def _block_size(blocks: tuple[int | None, ...]) -> str:
    """The flag that gives what is taken, where the default does not."""
    if None in blocks:
        return " --block-size all"
    return "" if 32 in blocks else f" --block-size {blocks[0]}"


def target_file(file: str, target: str) -> str:
    """prefill.onnx -> prefill.trt-rtx.onnx. Beside the canonical graph, not in a folder of its own:
    ONNX's external data must not lie above the graph, and the weights are stored once."""
    return f"{Path(file).stem}.{target}.onnx"
