"""lvlm: vision-language models with token merging and cache compression, on ONNX Runtime.

The public API is loaded when first used, so that ``import lvlm`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvlm.runtime.answers import Generation, Stats, Stream
    from lvlm.runtime.engine import AsyncEngine, Engine, Handle
    from lvlm.runtime.errors import LvlmError
    from lvlm.runtime.model import Model, load
    from lvlm.runtime.video import Clip

__all__ = [
    "AsyncEngine",
    "Clip",
    "Engine",
    "Generation",
    "Handle",
    "LvlmError",
    "Model",
    "Stats",
    "Stream",
    "load",
]

_HOME = {
    **dict.fromkeys(("Generation", "Stats", "Stream"), "lvlm.runtime.answers"),
    **dict.fromkeys(("AsyncEngine", "Engine", "Handle"), "lvlm.runtime.engine"),
    **dict.fromkeys(("Model", "load"), "lvlm.runtime.model"),
    "Clip": "lvlm.runtime.video",
    "LvlmError": "lvlm.runtime.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lvlm' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
