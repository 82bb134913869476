"""bitsandbytes: numbers of a table of its own, which no graph reads; the error says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lvlm.export.checkpoint.checkpoint_form import Form, Source
from lvlm.export.checkpoint.quantized.parts.module_tensors import refuse


class BitsAndBytes:
    """See Scheme."""

    name = "bitsandbytes"
    methods = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")

    def read(self, settings: Mapping[str, Any], found: Source) -> Form:  # noqa: ARG002
        what = "8 bits" if settings.get("load_in_8bit") else "4 bits"
        raise refuse(
            "bitsandbytes",
            what,
            "export the original model with --weights int4, or load this one with transformers, "
            "dequantize() it, save_pretrained, and export that",
        )


SCHEME = BitsAndBytes()
