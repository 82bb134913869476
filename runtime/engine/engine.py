"""The engine: a bundle that answers many requests at once, in memory that is fixed beforehand."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, overload

from lvlm.core.errors import LvlmError, ParameterError, QueueFullError
from lvlm.core.integrity import Verify
from lvlm.runtime.backends import open_backend, thread_count
from lvlm.runtime.bundle.reader import bundle_path, read_bundle
from lvlm.runtime.engine.batch import Batch
from lvlm.runtime.engine.chunks import ChunkPace
from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.engine.image_cache import ImageCache
from lvlm.runtime.engine.memory_plan import Memory, plan_memory, slot_capacity
from lvlm.runtime.engine.prefixes import prompt_keys
from lvlm.runtime.engine.request import Request
from lvlm.runtime.engine.scheduler import Scheduler
from lvlm.runtime.engine.session import Session, check_one_turn
from lvlm.runtime.engine.slots import Slots
from lvlm.runtime.engine.stats import EngineStats
from lvlm.runtime.generate.answers import Generation, Stream
from lvlm.runtime.generate.asks import Ask, Images, Question, Questions, Videos, one_ask, read_asks
from lvlm.runtime.generate.call_plan import check_one_answer, count_prompts, read_at, read_options
from lvlm.runtime.generate.loaded_graphs import TOKENS_AT_ONCE, Graphs
from lvlm.runtime.generate.token_count import TokenCount, TokenCounting, count_asks
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.cache import CompactCache
from lvlm.runtime.kv.static_capacity import static_capacity
from lvlm.runtime.options.generation_options import GenerationOptions, Keep, OptionValues
from lvlm.runtime.options.option_kinds import SWITCH, integer, number, read_value
from lvlm.runtime.prompt.prompts import PromptMaker
from lvlm.runtime.prompt.text import TextStream, Tokenizer
from lvlm.runtime.prompt.tools.form import ToolForm

if TYPE_CHECKING:
    from typing import Self, Unpack  # of Python 3.11

CHUNK = integer(0, TOKENS_AT_ONCE)
SECONDS = number("seconds above 0, or None", lambda x: x > 0)


class Engine(TokenCounting):
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
        verify: Verify = "sample",
        slots: int | None = None,
        memory_budget: int | str | None = None,
        max_text_len: int | None = None,
        max_images: int | None = None,
        keep: Keep | None = None,
        kv_keep: float | None = None,
        queue_limit: int = 256,
        image_cache: int | str = "64MB",
        reuse_prefixes: bool = True,
        chunk_tokens: int | None = None,
    ) -> None:
        """``slots`` requests run at once, or as many as ``memory_budget`` (2GB, or bytes) has room
        for beside the weights; both: an error if they do not fit. ``max_text_len`` and
        ``max_images`` below the bundle's, and lower ``keep`` or ``kv_keep``, make slots smaller;
        the latter two are the requests' defaults, too. ``queue_limit`` requests may wait.
        ``image_cache`` bounds the features of images that are kept. ``reuse_prefixes``: a prompt
        that begins like an earlier one, images included, is read from there on only (recipe none;
        see docs/engine.md). ``chunk_tokens``: a prompt is read so many tokens at a time, between
        decode steps, None: as many as are read in the time of twenty steps; 0: as a whole (recipe
        none; with others always).

        Raises BundleError, BackendError, ParameterError.
        """
        folder = bundle_path(bundle)
        threads = thread_count(threads)
        queue_limit = read_value("queue_limit", integer(1), queue_limit)
        reuse_prefixes = read_value("reuse_prefixes", SWITCH, reuse_prefixes)
        if chunk_tokens is not None:
            chunk_tokens = read_value("chunk_tokens", CHUNK, chunk_tokens)
        self.folder, self.device = folder, device
        self.manifest = manifest = read_bundle(folder, verify)
        ratios = read_options(manifest, None, {"keep": keep, "kv_keep": kv_keep})
        keep, kv_keep = ratios.keep, ratios.kv_keep
        self.keep, self.kv_keep = keep, kv_keep
        capacity = slot_capacity(manifest, max_text_len, max_images, keep, kv_keep)
        backend = open_backend(device, threads=threads)
        if backend.static_capacity:
            capacity = static_capacity(manifest)
        self.capacity = capacity
        chunked = manifest.in_place and "extend" in manifest.graphs and chunk_tokens != 0
        chunk = (chunk_tokens or TOKENS_AT_ONCE) if chunked else None
        self._memory = plan_memory(manifest, capacity, slots, memory_budget, image_cache, chunk)
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
        on_demand = ["prefill"] if chunked else [] if manifest.in_place else ["extend"]
        graphs = Graphs(folder, manifest, backend, on_demand)
        cache = CompactCache(
            backend,
            manifest.text,
            manifest.cache_dtype,
            self._memory.slots,
            capacity.per_layer,
            Budgets.of(manifest.cache_policy, manifest.text.layers, kv_keep),
        )
        self.images = ImageCache(self._memory.images)
        rows = Slots(
            cache,
            keeps_prefixes=reuse_prefixes and (manifest.in_place or manifest.question_free),
            in_place=manifest.in_place,
        )
        encode = partial(self.images.tokens, graphs.tokens)
        batch = Batch(graphs, rows, encode, in_pieces=chunked)
        pace = ChunkPace(chunk_tokens or None)
        self._scheduler = Scheduler(batch, self.images, queue_limit, pace)
        # Without waiting: it may run on any thread, the scheduler's own ones too.
        self._closer = weakref.finalize(self, self._scheduler.stop)
        self._closer.atexit = False  # the scheduler sees to that

    def session(self) -> Session:
        """A conversation that keeps its cache from turn to turn. Raises ParameterError where the
        bundle has no graph for that."""
        self._scheduler.check_process()
        if "extend" not in self.manifest.graphs:
            flag = "" if self.manifest.in_place else " with lvlm-export --sessions"
            raise ParameterError(
                f"sessions need the graph extend, which this bundle lacks; export it again{flag}, "
                "or give each turn without a session"
            )
        return Session(self._scheduler)

    def submit(
        self,
        prompt: Question,
        images: Images | None = (),
        videos: Videos | None = (),
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        session: Session | None = None,
        **given: Unpack[OptionValues],
    ) -> Handle:
        """Ask; the answer comes through the handle. Arguments are those of Model.generate.

        ``timeout`` in seconds from now: a request that is not answered by then ends with
        RequestTimeout. ``session``: the prompt is the next turn of that conversation. Images are
        opened and scaled here, in the caller's thread. Raises at once
        what is wrong with the request: ParameterError, PromptError, ImageError, CapacityError,
        QueueFullError, EngineClosedError; BackendError in a process that was forked from the
        engine's.
        """
        parsed = self.options(options, given)
        ask = one_ask(prompt, images, videos)
        request, handle = self.prepare(0, ask, parsed, timeout, session)
        self.enqueue(request, ())
        return handle

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompt: Question,
        images: Images | None = (),
        videos: Videos | None = (),
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        session: Session | None = None,
        **given: Unpack[OptionValues],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Questions,
        images: Sequence[Images | None] | None = (),
        videos: Sequence[Videos | None] | None = (),
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        **given: Unpack[OptionValues],
    ) -> list[Generation]: ...

    def generate(  # type: ignore[no-untyped-def]
        self, prompt, images=(), videos=(), options=None, *, timeout=None, session=None, **given
    ):
        """Ask and wait for the answer, or the answers to a list of prompts, as Model.generate.

        A list that is longer than the queue has room for waits for it. ``timeout`` counts for each
        prompt from when it is submitted; a ``session`` takes one at a time.
        """
        parsed = self.options(options, given)
        asks, many = read_asks(prompt, images, videos)
        check_one_turn(session, many)
        answers = self._answers(asks, parsed, timeout, session)
        return answers if many else answers[0]

    def stream(
        self,
        prompt: Question,
        images: Images | None = (),
        videos: Videos | None = (),
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        session: Session | None = None,
        **given: Unpack[OptionValues],
    ) -> Stream:
        """Stream, as Model.stream; the request is submitted here. Closing the stream cancels it."""
        parsed = self.options(options, given)
        check_one_answer(parsed)
        handle = self.submit(prompt, images, videos, parsed, timeout=timeout, session=session)

        def pieces() -> Generator[str | Generation]:
            yield from handle
            yield handle.result()

        return Stream(pieces(), lambda: handle.token_times, handle.cancel)

    def _counts(
        self, asks: Sequence[Ask], options: GenerationOptions | None, given: Mapping[str, object]
    ) -> list[TokenCount]:
        parsed = self.options(options, given)
        return count_asks(self.manifest, self._prompts, self.capacity, asks, parsed)

    def tool_form(self, chat_template: bool | str = True) -> ToolForm | None:
        """How that template, as the option says which, has calls of tools written; None where it
        has no place for tools. Raises ParameterError."""
        return self._prompts.tool_form(chat_template)

    def stats(self) -> EngineStats:
        """Statistics of the engine so far."""
        return self._scheduler.stats()

    def memory(self) -> Memory:
        """The memory it takes: the plan that was made before anything was allocated."""
        return self._memory

    # The steps of a call, for AsyncEngine, too

    def options(
        self, options: GenerationOptions | None, given: Mapping[str, object]
    ) -> GenerationOptions:
        """The options of a call; raises BackendError in a forked child, and ParameterError."""
        self._scheduler.check_process()
        parsed = read_options(self.manifest, options, given)
        if parsed.n > self._memory.slots:
            raise ParameterError(
                f"n is {parsed.n}, but this engine answers {self._memory.slots} at once; ask for "
                f"fewer, or open it with slots={parsed.n} or more memory_budget"
            )
        return replace(
            parsed,
            keep=self.keep if parsed.keep is None else parsed.keep,
            kv_keep=self.kv_keep if parsed.kv_keep is None else parsed.kv_keep,
        )

    def prepare(
        self,
        index: int,
        ask: Ask,
        options: GenerationOptions,
        timeout: float | None,
        session: Session | None = None,
    ) -> tuple[Request, Handle]:
        """The prompt ``index`` of a call as a request; its images are opened here."""
        now = time.perf_counter()
        if timeout is not None:
            timeout = read_value("timeout", SECONDS, timeout)
        row = self._prompts.prepare(index, ask.prompt, ask.images, options, ask.videos)
        row = read_at(self.manifest, row, options.keep)
        counts = count_prompts(
            self.manifest, [row], options.keep, options.kv_keep, capacity=self.capacity
        )
        digests = [image.digest() for image in row.images]
        others = [Handle(self._scheduler.wake) for _ in range(options.n - 1)]
        handle = Handle(self._scheduler.wake, others)
        request = Request(
            prompt=row,
            counts=counts,
            caller=handle,
            stream=TextStream(self.tokenizer, options.stop, row.lead),
            digests=digests,
            keys=prompt_keys(row, digests),
            submitted=handle.submitted,
            deadline=None if timeout is None else now + timeout,
            session=session,
            asked_ratios=(options.keep, options.kv_keep),
        )
        for index, other in enumerate(others, 1):
            request.fork(index, other, TextStream(self.tokenizer, options.stop, row.lead))
        if session is not None:
            session.take(self._scheduler, handle, options.n)
        return request, handle

    def enqueue(self, request: Request, before: Sequence[Handle]) -> Handle | None:
        """Put it into the queue. Where that is full: the one ``before`` it in the same call to wait
        for; QueueFullError without one. None when it is in."""
        try:
            self._scheduler.submit(request)
        except LvlmError as error:
            pending = next((handle for handle in before if not handle.all_done), None)
            if pending is not None and isinstance(error, QueueFullError):
                return pending
            request.caller.fail(error)  # a session may take its next turn
            raise
        return None

    def check_room(self) -> None:
        """Raises QueueFullError, EngineClosedError where a request would not be taken now."""
        self._scheduler.check_room()

    def _answers(
        self,
        asks: Sequence[Ask],
        options: GenerationOptions,
        timeout: float | None,
        session: Session | None,
    ) -> list[Generation]:
        handles: list[Handle] = []
        try:
            for index, ask in enumerate(asks):
                request, handle = self.prepare(index, ask, options, timeout, session)
                while (pending := self.enqueue(request, handles)) is not None:
                    pending.wait()
                handles.append(handle)
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()  # of use only if the wait was interrupted

    def close(self, *, finish: bool = False) -> None:
        """Take no more requests. Those there end with EngineClosedError, or are finished first."""
        self._scheduler.close(finish=finish)
        self._closer.detach()

    def __repr__(self) -> str:
        now = self.stats()
        return (
            f"<lvlm.Engine {self.folder} on {self.device}: {self._memory.slots} slots, "
            f"{now.running} running, {now.waiting} waiting>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
