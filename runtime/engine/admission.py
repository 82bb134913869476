"""Admission of requests to an engine: options read, a prompt prepared, the request queued."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lvlm.core.errors import LvlmError, ParameterError, QueueFullError
from lvlm.runtime.bundle.manifest import Capacity, Manifest
from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.engine.prefixes import prompt_keys
from lvlm.runtime.engine.request import Request
from lvlm.runtime.engine.scheduler import Scheduler
from lvlm.runtime.engine.session import Session
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.generate.asks import Ask
from lvlm.runtime.generate.call_plan import count_prompts, read_at, read_options
from lvlm.runtime.generate.token_count import TokenCount, count_asks
from lvlm.runtime.options.generation_options import GenerationOptions, Keep
from lvlm.runtime.options.option_kinds import number, read_value
from lvlm.runtime.prompt.prompts import PromptMaker
from lvlm.runtime.prompt.text import TextStream

SECONDS = number("seconds above 0, or None", lambda x: x > 0)


@dataclass(eq=False)
class Admission:
    """Admission of requests to one engine. Any thread may use it.

    ``capacity`` is that of each of ``slots``; ``keep`` and ``kv_keep`` are for requests that do not
    say.
    """

    manifest: Manifest
    prompts: PromptMaker
    scheduler: Scheduler
    capacity: Capacity
    slots: int
    keep: Keep | None
    kv_keep: float | None

    def options(
        self, options: GenerationOptions | None, given: Mapping[str, object]
    ) -> GenerationOptions:
        """The options of a call; raises BackendError in a forked child, and ParameterError."""
        self.scheduler.check_process()
        parsed = read_options(self.manifest, options, given)
        if parsed.n > self.slots:
            raise ParameterError(
                f"n is {parsed.n}, but this engine answers {self.slots} at once; ask for "
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
        row = self.prompts.prepare(index, ask.prompt, ask.images, options, ask.videos)
        row = read_at(self.manifest, row, options.keep)
        counts = count_prompts(
            self.manifest, [row], options.keep, options.kv_keep, capacity=self.capacity
        )
        digests = [image.digest() for image in row.images]
        others = [Handle(self.scheduler.wake) for _ in range(options.n - 1)]
        handle = Handle(self.scheduler.wake, others)
        tokenizer = self.prompts.tokenizer
        request = Request(
            prompt=row,
            counts=counts,
            caller=handle,
            stream=TextStream(tokenizer, options.stop, row.lead),
            digests=digests,
            keys=prompt_keys(row, digests),
            submitted=handle.submitted,
            deadline=None if timeout is None else now + timeout,
            session=session,
            asked_ratios=(options.keep, options.kv_keep),
        )
        for place, other in enumerate(others, 1):
            request.fork(place, other, TextStream(tokenizer, options.stop, row.lead))
        if session is not None:
            session.take(self.scheduler, handle, options.n)
        return request, handle

    def enqueue(self, request: Request, before: Sequence[Handle] = ()) -> Handle | None:
        """Put it into the queue. Where that is full: the one ``before`` it in the same call to wait
        for; QueueFullError without one. None when it is in."""
        try:
            self.scheduler.submit(request)
        except LvlmError as error:
            pending = next((handle for handle in before if not handle.all_done), None)
            if pending is not None and isinstance(error, QueueFullError):
                return pending
            request.caller.fail(error)  # a session may take its next turn
            raise
        return None

    def answers(
        self,
        asks: Sequence[Ask],
        options: GenerationOptions,
        timeout: float | None,
        session: Session | None,
    ) -> list[Generation]:
        """The answers to all prompts of a call, once they are there. Raises what submit and result
        raise."""
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

    def counts(self, asks: Sequence[Ask], options: GenerationOptions) -> list[TokenCount]:
        """The tokens of each prompt alone, and of an answer in a slot."""
        return count_asks(self.manifest, self.prompts, self.capacity, asks, options)
