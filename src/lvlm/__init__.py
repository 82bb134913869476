"""lvlm: vision-language models with token merging and cache compression, on ONNX Runtime.

The public API is loaded when first used, so that ``import lvlm`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvlm.runtime.errors import LvlmError
    from lvlm.runtime.model import Generation, Model, Stats, Stream, load

__all__ = ["Generation", "LvlmError", "Model", "Stats", "Stream", "load"]

_HOME = dict.fromkeys(("Generation", "Model", "Stats", "Stream", "load"), "lvlm.runtime.model")
_HOME["LvlmError"] = "lvlm.runtime.errors"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lvlm' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
