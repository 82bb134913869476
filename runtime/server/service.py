"""Engines of a server by name, and whether it takes requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from lvlm.core.errors import EngineClosedError, LvlmError, ParameterError
from lvlm.runtime.bundle.entry_form import ITEM_BYTES, entry_width
from lvlm.runtime.engine.aio import AsyncEngine
from lvlm.runtime.engine.async_handle import AsyncHandle
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.text import Tokenizer
from lvlm.runtime.server.asked import Read, Usual, Wanted
from lvlm.runtime.server.metrics import Metrics
from lvlm.runtime.server.refusals import Refusal
from lvlm.runtime.server.tools import ToolSkill, by_its_name

log = logging.getLogger("lvlm.server")
MAX_READ = 16  # images and videos that are read at once
MAX_COMPILED = 2  # requests with a structure that are prepared at once


@dataclass(frozen=True)
class Served:
    """An engine under the name that clients call it by. ``usual``: options where a request says
    nothing."""

    name: str
    engine: AsyncEngine
    usual: Mapping[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.engine.tokenizer

    @property
    def skill(self) -> ToolSkill:
        """Skill of its model with tools. Raises ParameterError for a chat template that is not
        valid."""
        form = self.engine.engine.tool_form(self.usual.get("chat_template", True))
        return ToolSkill(form, self.tokenizer)

    @property
    def limits(self) -> Usual:
        """``usual``, with room for the longest answer and as many images as there is room for."""
        capacity = self.engine.engine.capacity
        return Usual({"max_new_tokens": capacity.max_text_len, **self.usual}, capacity.max_images)

    def full_cache_bytes(self, tokens: int) -> int:
        """Bytes of so many tokens in a cache that drops nothing."""
        manifest = self.engine.engine.manifest
        text = manifest.text
        dtype = manifest.cache_dtype
        entry = 2 * text.kv_heads * entry_width(text.head_dim, dtype) * ITEM_BYTES[dtype]
        return tokens * text.layers * entry


class Service:
    """The models of a server, what it counts, and whether it takes requests.

    ``read`` gets images and videos by their URLs. ``ready``: warmed up; ``draining``: only what
    was begun is finished.
    """

    def __init__(self, models: Sequence[Served], read: Read) -> None:
        self.models = {served.name: served for served in models}
        self._read, self._reading = read, asyncio.Semaphore(MAX_READ)
        self._compiling = asyncio.Semaphore(MAX_COMPILED)
        self.metrics = Metrics({name: one.engine.stats for name, one in self.models.items()})
        self.ready = self.draining = False

    def find(self, name: str | None) -> Served:
        """The model that a request names; without a name the only one. Raises Refusal."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise Refusal(400, f"model is missing; give one of {self._names()}", param="model")
        if name not in self.models:
            raise Refusal(
                404,
                f"there is no model {name[:200]!r}; there is {self._names()}",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    def _names(self) -> str:
        return ", ".join(self.models)

    async def read(self, url: str) -> bytes:
        """An image or a video by its URL; so many at a time. Raises what its reader raises."""
        async with self._reading:
            return await self._read(url)

    def check(self, served: Served) -> None:
        """Before images are read: raises EngineClosedError or QueueFullError where no request is
        taken."""
        if self.draining:
            raise EngineClosedError("this server is shutting down; ask another one")
        served.engine.engine.check_room()

    async def submit(self, served: Served, asked: Wanted) -> AsyncHandle:
        """Ask the engine. Raises what Engine.submit raises."""
        # Structures are compiled by threads that all others need, too
        async with self._compiling if asked.options.structure else nullcontext():
            try:
                return await served.engine.submit(
                    asked.prompt, options=asked.options, timeout=asked.timeout
                )
            except ParameterError as error:
                raise by_its_name(error, asked.tools) from None

    async def warm_up(self) -> None:
        """A token of each model, so that the first request finds everything loaded."""
        options = GenerationOptions(max_new_tokens=1, chat_template=False)
        for served in self.models.values():
            fields = {"model": served.name}
            try:
                await served.engine.generate("Hello", options=options)
            except LvlmError as error:
                log.error("model failed: %s", error, extra={"fields": fields})  # never ready
                return
            log.info("model is ready", extra={"fields": fields})
        self.ready = True

    async def close(self) -> None:
        for served in self.models.values():
            await served.engine.close()
