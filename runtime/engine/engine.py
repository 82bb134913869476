"""The engine: a bundle that answers many requests at once, in memory that is fixed beforehand."""

from __future__ import annotations

import os
import weakref
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, overload

from lvlm.core.errors import ParameterError
from lvlm.core.integrity import Verify
from lvlm.runtime.backends import open_backend, thread_count
from lvlm.runtime.bundle.reader import bundle_path, read_bundle
from lvlm.runtime.engine.admission import Admission
from lvlm.runtime.engine.chunks import ChunkPace
from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.engine.image_cache import ImageCache
from lvlm.runtime.engine.memory_plan import Memory, plan_memory, slot_capacity
from lvlm.runtime.engine.open_batch import open_batch
from lvlm.runtime.engine.scheduler import Scheduler
from lvlm.runtime.engine.session import Session, check_one_turn
from lvlm.runtime.engine.stats import EngineStats
from lvlm.runtime.generate.answers import Generation, Stream
from lvlm.runtime.generate.asks import Ask, Images, Question, Questions, Videos, one_ask, read_asks
from lvlm.runtime.generate.call_plan import check_one_answer, read_options
from lvlm.runtime.generate.loaded_graphs import TOKENS_AT_ONCE
from lvlm.runtime.generate.token_count import TokenCount, TokenCounting
from lvlm.runtime.kv.static_capacity import static_capacity
from lvlm.runtime.options.generation_options import GenerationOptions, Keep, OptionValues
from lvlm.runtime.options.option_kinds import SWITCH, integer, read_value
from lvlm.runtime.prompt.prompts import PromptMaker
from lvlm.runtime.prompt.tools.form import ToolForm

if TYPE_CHECKING:
    from typing import Self, Unpack  # of Python 3.11

CHUNK = integer(0, TOKENS_AT_ONCE)


class Engine(TokenCounting):
    """A bundle on a device that answers requests as they come, several at once.

    A slot holds one running request; all slots are allocated at the start and nothing grows after
    that. Any thread may call it. Use as a context manager, or call ``close``.

    Args:
        bundle, device, threads, verify: as of Model.
        slots: requests that run at once. None: as many as ``memory_budget`` has room for, or 4
            without one.
        memory_budget: bytes of weights, slots, workspace and image cache together, as a number or
            as "2GB" or "512MiB". None: no limit.
        max_text_len: tokens of a request's text and its answer together. None: the bundle's; fewer
            make slots smaller.
        max_images: images of a request, likewise.
        keep: fraction of the image tokens to keep, or one per reduction, for requests that do not
            say. None: as exported; a lower one makes slots smaller.
        kv_keep: fraction of the cache entries to keep, likewise.
        queue_limit: requests that may wait.
        image_cache: bytes of image features that are kept by content, given as memory_budget is.
        reuse_prefixes: read a prompt that begins like an earlier one, images included, from there
            on only, where the recipe allows it (docs/engine.md).
        chunk_tokens: tokens of a prompt that are read at once between decode steps, up to 512; 0:
            all. None: as many as are read in the time of twenty steps, or slices of that time
            where a device can hold graphs. Recipes that decide with a whole prompt read it at once.

    Raises:
        ParameterError: a value cannot be used, or the budget has no room for the slots.
        BundleError, BackendError, DeviceMemoryError: as of Model; the cache may have no room, too.
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
        prompts = PromptMaker.of_bundle(folder, manifest, capacity.max_images)
        self.tokenizer = prompts.tokenizer
        self.images = ImageCache(self._memory.images)
        batch = open_batch(
            folder,
            manifest,
            backend,
            capacity,
            self._memory.slots,
            kv_keep,
            self.images,
            reuse_prefixes=reuse_prefixes,
            in_pieces=chunked,
        )
        pace = ChunkPace(chunk_tokens or None)
        self._scheduler = Scheduler(batch, self.images, queue_limit, pace, backend.gate())
        # For AsyncEngine, too
        self.admission = Admission(
            manifest, prompts, self._scheduler, capacity, self._memory.slots, keep, kv_keep
        )
        # Without waiting: it may run on any thread, the scheduler's own ones too.
        self._closer = weakref.finalize(self, self._scheduler.stop)
        self._closer.atexit = False  # the scheduler sees to that

    @property
    def reads_in_slices(self) -> bool:
        """True where any prompt is read in slices of time beside what runs."""
        scheduler = self._scheduler
        return scheduler.gate is not None and scheduler.pace.free and scheduler.batch.gated

    def session(self) -> Session:
        """A conversation that keeps its cache from turn to turn.

        Returns:
            Session for the calls of this engine.

        Raises:
            ParameterError: the bundle lacks the graph that reads further turns, or its model reads
                none behind what it has read.
            BackendError: this process was forked from the engine's.
        """
        self._scheduler.check_process()
        if self.manifest.text.bidirectional:
            raise ParameterError(
                "a session has no use here: tokens of this model's prompts see those that follow, "
                "so that every turn is read as a whole; give each turn without one"
            )
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
        """Ask; the answer comes through the handle, and so does what goes wrong from then on.

        Images are opened and scaled here, in the caller's thread.

        Args:
            prompt, images, videos, options, given: as of Model.generate; one prompt.
            timeout: seconds from now; a request that is not answered by then ends with
                RequestTimeout. None: no limit.
            session: the conversation whose next turn the prompt is.

        Returns:
            Handle of the request.

        Raises:
            ParameterError: as of Model.generate; more answers than slots; a session that is closed,
                of another engine, or still being answered.
            PromptError, ImageError, BundleError: as of Model.generate.
            CapacityError: the request does not fit into a slot.
            QueueFullError: as many requests wait as may.
            EngineClosedError: the engine is closed.
            BackendError: this process was forked from the engine's; PyAV or llguidance is missing.
        """
        parsed = self.admission.options(options, given)
        ask = one_ask(prompt, images, videos)
        request, handle = self.admission.prepare(0, ask, parsed, timeout, session)
        self.admission.enqueue(request)
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
        """Ask and wait for the answer, or for the answers to a list of prompts.

        A list that is longer than the queue has room for waits for it.

        Args:
            prompt, images, videos, options, given: as of Model.generate.
            timeout: seconds for each prompt, from when it is submitted.
            session: as of submit; it takes one prompt, no list.

        Returns:
            Generation, or a list of them in the order of the prompts.

        Raises:
            LvlmError: what submit and Handle.result raise.
        """
        parsed = self.admission.options(options, given)
        asks, many = read_asks(prompt, images, videos)
        check_one_turn(session, many)
        answers = self.admission.answers(asks, parsed, timeout, session)
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
        """Submit a request and stream its answer. Closing the stream cancels the request.

        Args:
            prompt, images, videos, options, timeout, session, given: as of submit.

        Returns:
            Stream of the pieces of text.

        Raises:
            LvlmError: what submit raises; while it is read, what Handle.result raises.
            ParameterError: ``n`` is above 1.
        """
        parsed = self.admission.options(options, given)
        check_one_answer(parsed)
        handle = self.submit(prompt, images, videos, parsed, timeout=timeout, session=session)

        def pieces() -> Generator[str | Generation]:
            yield from handle
            yield handle.result()

        return Stream(pieces(), lambda: handle.token_times, handle.cancel)

    def _counts(
        self, asks: Sequence[Ask], options: GenerationOptions | None, given: Mapping[str, object]
    ) -> list[TokenCount]:
        return self.admission.counts(asks, self.admission.options(options, given))

    def tool_form(self, chat_template: bool | str = True) -> ToolForm | None:
        """Form in which a chat template has calls of tools written.

        Args:
            chat_template: which one, as the option of that name says.

        Returns:
            The form; None where the template has no place for tools, or its form is not known.

        Raises:
            ParameterError: the template is not valid.
        """
        return self.admission.prompts.tool_form(chat_template)

    def stats(self) -> EngineStats:
        """Count what the engine has done.

        Returns:
            EngineStats up to now.
        """
        return self._scheduler.stats()

    def memory(self) -> Memory:
        """Tell the memory that the engine takes.

        Returns:
            The plan that was made before anything was allocated.
        """
        return self._memory

    def check_room(self) -> None:
        """Check that a request would be taken now.

        Raises:
            QueueFullError: as many requests wait as may.
            EngineClosedError: the engine is closed.
        """
        self._scheduler.check_room()

    def close(self, *, finish: bool = False) -> None:
        """Take no more requests, wait until those that are there have ended, and free the memory.

        Args:
            finish: let them be answered; otherwise they end with EngineClosedError.
        """
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
