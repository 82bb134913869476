"""The host's loop, and many requests at once over one loaded bundle: what a service embeds.

For asyncio, which only these import: engine/aio.py and async_handle.py.
"""

from lvlm.runtime.engine.engine import Engine
from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.engine.memory_plan import Memory
from lvlm.runtime.engine.session import Session
from lvlm.runtime.engine.stats import EngineStats

__all__ = ["Engine", "EngineStats", "Handle", "Memory", "Session"]
