"""lvlm: vision-language models with token merging and cache compression, on ONNX Runtime.

The public API is loaded when first used, so that ``import lvlm`` costs nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing takes longer than all else before a command sees Ctrl-C

if TYPE_CHECKING:
    from lvlm.core.errors import (
        BackendError,
        BundleError,
        CapacityError,
        DeviceMemoryError,
        EngineClosedError,
        ImageError,
        LvlmError,
        ParameterError,
        PromptError,
        QueueFullError,
        RequestCancelled,
        RequestError,
        RequestTimeout,
    )
    from lvlm.runtime.engine import Engine, EngineStats, Handle, Memory, Session
    from lvlm.runtime.engine.aio import AsyncEngine
    from lvlm.runtime.engine.async_handle import AsyncHandle
    from lvlm.runtime.generate.answers import Generation, SeenImage, Stats, Stream
    from lvlm.runtime.generate.token_count import TokenCount
    from lvlm.runtime.media.video import Video
    from lvlm.runtime.model import Model, load
    from lvlm.runtime.options.generation_options import GenerationOptions
    from lvlm.runtime.sampling.sampler import TokenScore

    __version__: str

# Where each public name is; the imports above say the same to type checkers and editors.
_HOME = {
    "lvlm.runtime.generate.answers": ("Generation", "SeenImage", "Stats", "Stream"),
    "lvlm.runtime.generate.token_count": ("TokenCount",),
    "lvlm.runtime.engine": ("Engine", "EngineStats", "Handle", "Memory", "Session"),
    "lvlm.runtime.engine.aio": ("AsyncEngine",),
    "lvlm.runtime.engine.async_handle": ("AsyncHandle",),
    "lvlm.core.errors": (
        *("BackendError", "BundleError", "CapacityError", "DeviceMemoryError"),
        *("EngineClosedError", "ImageError", "LvlmError", "ParameterError", "PromptError"),
        *("QueueFullError", "RequestCancelled", "RequestError", "RequestTimeout"),
    ),
    "lvlm.runtime.options.generation_options": ("GenerationOptions",),
    "lvlm.runtime.model": ("Model", "load"),
    "lvlm.runtime.sampling.sampler": ("TokenScore",),
    "lvlm.runtime.media.video": ("Video",),
}

__all__ = [
    "AsyncEngine",
    "AsyncHandle",
    "BackendError",
    "BundleError",
    "CapacityError",
    "DeviceMemoryError",
    "Engine",
    "EngineClosedError",
    "EngineStats",
    "Generation",
    "GenerationOptions",
    "Handle",
    "ImageError",
    "LvlmError",
    "Memory",
    "Model",
    "ParameterError",
    "PromptError",
    "QueueFullError",
    "RequestCancelled",
    "RequestError",
    "RequestTimeout",
    "SeenImage",
    "Session",
    "Stats",
    "Stream",
    "TokenCount",
    "TokenScore",
    "Video",
    "load",
]


if not TYPE_CHECKING:  # type checkers would take every name for one that it finds

    def __getattr__(name: str) -> object:
        import importlib

        if name == "__version__":
            found = importlib.import_module("lvlm.core.version").version()
        else:
            home = next((home for home, names in _HOME.items() if name in names), None)
            if home is None:
                raise AttributeError(f"module 'lvlm' has no attribute '{name}'")
            found = getattr(importlib.import_module(home), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        own = {name for name in globals() if name.startswith("__")}
        return sorted({*own, *__all__, "__version__"})
