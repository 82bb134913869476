"""Description of a target: one engine, of one version on one platform, as data.

``passes/lowering.py`` turns a description into graphs, ``lvlm-build engine`` into engines. Where
NVIDIA's documentation is all that is known, ``verified`` is empty and every operator that is in
doubt is decomposed.
"""

from __future__ import annotations

from dataclasses import dataclass
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
class Description:
    """Description of a target: what its engine takes.

    flavour       the package that runs it: of TensorRT's, engines that it builds; of the others,
                  graphs as they are written
    version       of that package, as many parts as must agree
    platform      the machines it is for
    sms           their architectures, compute capabilities without the dot; (): any
    opset         newest one its parser takes
    imports       those of NEW_OPS that it takes; the others are decomposed
    attention     data types in which it takes Attention; in others that is decomposed
    row_heads     fewest heads with which it takes Attention of one query row
    matmul_types  data types in which it multiplies matrices: those a bundle for it can be in
    plugins       lvlm ops are plugins, which their functions must not stand in for
    static_cache  the length of the cache is fixed in the graph
    topk_limit    largest K of its TopK; None: no limit is known
    low_precision takes quantized weights, and a cache narrower than what is computed in
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
    row_heads: int = 1

    @property
    def built(self) -> bool:
        """Engines are built from the graphs."""
        return self.flavour.startswith("tensorrt")

    def file(self, file: str) -> str:
        """Name of the lowered form of a graph's file."""
        return target_file(file, self.name)


def target_file(file: str, target: str) -> str:
    """prefill.onnx -> prefill.trt-rtx.onnx. Beside the canonical graph, not in a folder of its own:
    ONNX's external data must not lie above the graph, and the weights are stored once."""
    return f"{Path(file).stem}.{target}.onnx"
