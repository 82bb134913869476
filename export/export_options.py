"""Options of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lvlm.core.errors import ParameterError
from lvlm.export.checkpoint.quantized.parts.packed_tensor import BLOCKS
from lvlm.export.recipes.recipe import Recipe
from lvlm.export.targets.target import Target
from lvlm.export.weights.quantization import KINDS, WeightQuantization

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CACHES = {"fp16": torch.float16, "int8": torch.int8}  # of lower precision than is computed in
BLOCK = 32  # of quantized weights; docs/notes/quantization.md: what was tried


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export. ``dtype`` None: as the checkpoint has it (its config.json); ``weights``
    None: the language model's linear layers are of ``dtype``, too; ``cache`` None: so is the cache;
    ``max_image_tokens`` None: images give as many tokens as the checkpoint says; ``sessions``:
    conversations can keep a compressed cache from turn to turn (recipe none: always);
    ``block_size`` "all": the inputs of an output share a scale;
    ``dequantize``: weights that come quantized are stored in ``dtype``, or as ``weights`` says;
    ``lora``: an adapter's folder, to be merged; ``calibrate``: weights are rounded on samples,
    those of a file or, "", the built-in ones."""

    model: str
    recipe: Recipe
    output: Path
    dtype: str | None = None
    weights: str | None = None
    block_size: int | Literal["all"] | None = None
    calibrate: str | None = None
    cache: str | None = None
    revision: str | None = None
    max_text_len: int = 2048
    max_images: int = 1
    max_image_tokens: int | None = None
    validate: bool = True
    sessions: bool = False
    dequantize: bool = False
    lora: Path | None = None
    targets: tuple[Target, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_text_len", "max_images", "max_image_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ParameterError(f"--{name.replace('_', '-')} is {value}; give 1 or more")
        for name, values in (("dtype", DTYPES), ("weights", KINDS), ("cache", CACHES)):
            value = getattr(self, name)
            if value is not None and value not in list(values):
                raise ParameterError(f"--{name} {value}: give one of {', '.join(values)}")
        if self.block_size is not None:
            if self.weights is None:
                raise ParameterError("--block-size is for quantized weights; add --weights int4")
            if self.block_size == "all":
                if self.weights != "int8":
                    raise ParameterError("--block-size all is for --weights int8; give a number")
            elif self.block_size not in BLOCKS:
                sizes = ", ".join(map(str, BLOCKS))
                raise ParameterError(f"--block-size {self.block_size}: give one of {sizes}")

        if self.calibrate is not None and self.weights != "int4":
            raise ParameterError(
                "--calibrate is for weights of 4 bits; add --weights int4, or leave it out"
            )

    @property
    def samples(self) -> str | None:
        """The file that weights are rounded on; None: the built-in samples."""
        return self.calibrate or None

    @property
    def quantization(self) -> WeightQuantization | None:
        if self.weights is None:
            return None
        if self.block_size == "all":
            return WeightQuantization(KINDS[self.weights], BLOCK, whole=True)
        return WeightQuantization(KINDS[self.weights], self.block_size or BLOCK)
