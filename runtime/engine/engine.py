"""The engine: a bundle that answers many requests at once, in memory that is fixed beforehand."""

from __future__ import annotations

import os
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from lvlm.runtime.answers import Generation
from lvlm.runtime.asks import Images, Videos, one_ask
from lvlm.runtime.backends import open_backend
from lvlm.runtime.budgets import Budgets
from lvlm.runtime.bundle import read_bundle
from lvlm.runtime.cache import CompactCache
from lvlm.runtime.counts import count_prompts, read_options
from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.engine.image_cache import ImageCache
from lvlm.runtime.engine.memory import Memory, plan_memory, slot_capacity
from lvlm.runtime.engine.prefixes import prompt_keys, reusable
from lvlm.runtime.engine.request import Request
from lvlm.runtime.engine.scheduler import Scheduler
from lvlm.runtime.engine.slots import Slots
from lvlm.runtime.errors import ParameterError
from lvlm.runtime.generation_options import GenerationOptions, Keep, OptionValues
from lvlm.runtime.graphs import Graphs
from lvlm.runtime.prompts import PromptMaker
from lvlm.runtime.text import TextStream, Tokenizer


class Engine:
    """Answers requests as they come, several at once. Any thread may call it.

    A slot holds one running request; all slots are allocated at the start and nothing grows after
    that. Use as a context manager, or call ``close``.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        device: str = "cpu",
        threads: int | None = None,
        verify: bool = True,
        slots: int | None = None,
        memory_budget: int | str | None = None,
        max_text_len: int | None = None,
        max_images: int | None = None,
        keep: Keep | None = None,
        kv_keep: float | None = None,
        queue_limit: int = 256,
        image_cache: int | str = "64MB",
        reuse_prefixes: bool = True,
    ) -> None:
        """``slots`` requests run at once, or as many as ``memory_budget`` (2GB, or bytes) has room
        for beside the weights; both: an error if they do not fit. ``max_text_len`` and
        ``max_images`` below the bundle's, and lower ``keep`` or ``kv_keep``, make slots smaller;
        the latter two are the requests' defaults, too. ``queue_limit`` requests may wait.
        ``image_cache`` bounds the features of pictures that are kept. ``reuse_prefixes``: a prompt
        that begins like an earlier one, pictures included, is read from there on only (recipe none;
        see docs/engine.md).

        Raises BundleError, BackendError, ParameterError.
        """
        folder = Path(bundle)
        if threads is not None and threads < 1:
            raise ParameterError(f"threads is {threads}; give 1 or more")
        if isinstance(queue_limit, bool) or not isinstance(queue_limit, int) or queue_limit < 1:
            raise ParameterError(f"queue_limit is {queue_limit!r}; give 1 or more")
        self.manifest = manifest = read_bundle(folder, verify=verify)
        self.keep, self.kv_keep = keep, kv_keep
        capacity = slot_capacity(manifest, max_text_len, max_images, keep, kv_keep)
        backend = open_backend(device, threads=threads)
        if backend.static_capacity:
            capacity = manifest.capacity
        self.capacity = capacity
        self._memory = plan_memory(manifest, capacity, slots, memory_budget, image_cache)
        self.tokenizer = Tokenizer(folder / "tokenizer.json", manifest.text.eos_ids)
        self._prompts = PromptMaker(
            self.tokenizer,
            manifest.images,
            manifest.text.vocab,
            manifest.chat_template,
            manifest.special_tokens,
            capacity.max_images,
            manifest.generation,
        )
        graphs = Graphs(folder, manifest, backend)
        cache = CompactCache(
            backend,
            manifest.text,
            manifest.cache_dtype,
            self._memory.slots,
            capacity.per_layer,
            Budgets.of(manifest.compression, manifest.text.layers, kv_keep),
        )
        self.images = ImageCache(self._memory.images)
        self._scheduler = Scheduler(
            graphs,
            Slots(cache, keeps_prefixes=reuse_prefixes and reusable(manifest)),
            self.images,
            queue_limit,
        )
        # Without waiting: it may run on any thread, the scheduler's own ones too.
        self._closer = weakref.finalize(self, self._scheduler.stop)
        self._closer.atexit = False  # the scheduler sees to that

    def submit(
        self,
        prompt: str,
        images: Images | None = (),
        videos: Videos | None = (),
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        **given: Unpack[OptionValues],
    ) -> Handle:
        """Ask; the answer comes through the handle. Arguments are those of Model.generate.

        ``timeout`` in seconds from now: a request that is not answered by then ends with
        RequestTimeout. Pictures are opened and scaled here, in the caller's thread. Raises at once
        what is wrong with the request: ParameterError, PromptError, ImageError, CapacityError,
        QueueFullError, EngineClosedError.
        """
        now = time.perf_counter()
        number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if timeout is not None and not (number and timeout > 0):
            raise ParameterError(f"timeout is {timeout!r}; give seconds above 0, or None")
        ask = one_ask(prompt, images, videos)
        parsed = read_options(self.manifest, options, given)
        parsed = replace(
            parsed,
            keep=self.keep if parsed.keep is None else parsed.keep,
            kv_keep=self.kv_keep if parsed.kv_keep is None else parsed.kv_keep,
        )
        row = self._prompts.prepare(0, ask.prompt, ask.images, parsed, ask.videos)
        counts = count_prompts(
            self.manifest, [row], parsed.keep, parsed.kv_keep, capacity=self.capacity
        )
        digests = [picture.digest() for picture in row.pictures]
        request = Request(
            prompt=row,
            counts=counts,
            stream=TextStream(self.tokenizer, parsed.stop, row.lead),
            handle=Handle(self._scheduler.wake),
            digests=digests,
            keys=prompt_keys(row, digests),
            deadline=None if timeout is None else now + timeout,
        )
        self._scheduler.submit(request)
        return request.handle

    def generate(
        self,
        prompt: str,
        images: Images | None = (),
        videos: Videos | None = (),
        options: GenerationOptions | None = None,
        **given: Unpack[OptionValues],
    ) -> Generation:
        """Ask and wait for the answer."""
        handle = self.submit(prompt, images, videos, options, **given)
        try:
            return handle.result()
        finally:
            handle.cancel()  # of use only if the wait was interrupted

    def memory(self) -> Memory:
        """What it takes: the plan that was made before anything was allocated."""
        return self._memory

    def close(self, *, finish: bool = False) -> None:
        """Take no more requests. Those there end with EngineClosedError, or are finished first."""
        self._scheduler.close(finish=finish)
        self._closer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
