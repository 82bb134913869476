"""Many requests at once over one loaded bundle: what a service embeds."""

from lvlm.runtime.engine.aio import AsyncEngine, AsyncHandle
from lvlm.runtime.engine.engine import Engine
from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.engine.memory_plan import Memory
from lvlm.runtime.engine.stats import EngineStats

__all__ = ["AsyncEngine", "AsyncHandle", "Engine", "EngineStats", "Handle", "Memory"]
