"""The engine for asyncio: nothing here blocks the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import TYPE_CHECKING, overload

from lvlm.core.errors import ParameterError, shown
from lvlm.runtime.engine.async_handle import AsyncHandle
from lvlm.runtime.engine.engine import Engine
from lvlm.runtime.engine.memory_plan import Memory
from lvlm.runtime.engine.session import Session, check_one_turn
from lvlm.runtime.engine.stats import EngineStats
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.generate.asks import Ask, Images, Question, Questions, Videos, one_ask, read_asks
from lvlm.runtime.generate.call_plan import check_one_answer
from lvlm.runtime.generate.token_count import TokenCount
from lvlm.runtime.options.generation_options import GenerationOptions, OptionValues

if TYPE_CHECKING:
    from typing import Self, Unpack  # of Python 3.11


class AsyncEngine:
    """An Engine whose requests are awaited. ``async with`` closes the engine at the end.

    Args:
        engine: the engine, which may be used beside this.

    Raises:
        ParameterError: it is no Engine.
    """

    def __init__(self, engine: Engine) -> None:
        if not isinstance(engine, Engine):
            raise ParameterError(
                f"engine is {shown(engine)}; give lvlm.AsyncEngine(lvlm.Engine(BUNDLE))"
            )
        self.engine = engine

    async def submit(
        self,
        prompt: Question,
        images: Images | None = (),
        videos: Videos | None = (),
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        session: Session | None = None,
        **given: Unpack[OptionValues],
    ) -> AsyncHandle:
        """Ask, as Engine.submit does; images are opened in a thread of their own.

        Args:
            prompt, images, videos, options, timeout, session, given: as of Engine.submit.

        Returns:
            AsyncHandle of the request.

        Raises:
            LvlmError: what Engine.submit raises.
        """
        parsed = self.engine.admission.options(options, given)
        ask = one_ask(prompt, images, videos)
        return await self._submit(0, ask, parsed, timeout, (), session)

    @overload
    async def generate(  # type: ignore[overload-overlap]
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
    async def generate(
        self,
        prompt: Questions,
        images: Sequence[Images | None] | None = (),
        videos: Sequence[Videos | None] | None = (),
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        **given: Unpack[OptionValues],
    ) -> list[Generation]: ...

    async def generate(  # type: ignore[no-untyped-def]
        self, prompt, images=(), videos=(), options=None, *, timeout=None, session=None, **given
    ):
        """Ask and wait, as Engine.generate does. A task that is cancelled while it waits cancels
        the requests.

        Args:
            prompt, images, videos, options, timeout, session, given: as of Engine.generate.

        Returns:
            Generation, or a list of them in the order of the prompts.

        Raises:
            LvlmError: what Engine.generate raises.
        """
        parsed = self.engine.admission.options(options, given)
        asks, many = read_asks(prompt, images, videos)
        check_one_turn(session, many)
        answers = await self._answers(asks, parsed, timeout, session)
        return answers if many else answers[0]

    async def stream(
        self,
        prompt: Question,
        images: Images | None = (),
        videos: Videos | None = (),
        options: GenerationOptions | None = None,
        *,
        timeout: float | None = None,
        session: Session | None = None,
        **given: Unpack[OptionValues],
    ) -> AsyncGenerator[str]:
        """Stream the text of an answer; to be closed (contextlib.aclosing), or read to the end.
        ``submit`` tells more than the text.

        Args:
            prompt, images, videos, options, timeout, session, given: as of Engine.submit.

        Yields:
            The pieces of text as they come.

        Raises:
            LvlmError: what Engine.stream raises, as the first piece is asked for.
        """
        parsed = self.engine.admission.options(options, given)
        check_one_answer(parsed)
        handle = await self.submit(prompt, images, videos, parsed, timeout=timeout, session=session)
        try:
            async for piece in handle:
                yield piece
        finally:
            handle.cancel()

    @overload
    async def count_tokens(  # type: ignore[overload-overlap]
        self,
        prompt: Question,
        images: Images | None = (),
        videos: Videos | None = (),
        options: GenerationOptions | None = None,
        **given: Unpack[OptionValues],
    ) -> TokenCount: ...

    @overload
    async def count_tokens(
        self,
        prompt: Questions,
        images: Sequence[Images | None] | None = (),
        videos: Sequence[Videos | None] | None = (),
        options: GenerationOptions | None = None,
        **given: Unpack[OptionValues],
    ) -> list[TokenCount]: ...

    async def count_tokens(self, prompt, images=(), videos=(), options=None, **given):  # type: ignore[no-untyped-def]
        """Count the tokens of prompts; images are opened in a thread of their own.

        Args:
            prompt, images, videos, options, given: as of Engine.generate.

        Returns:
            TokenCount, or a list of them in the order of the prompts.

        Raises:
            LvlmError: what Engine.count_tokens raises.
        """
        count = partial(self.engine.count_tokens, prompt, images, videos, options, **given)
        return await asyncio.to_thread(count)

    def session(self) -> Session:
        """A conversation that keeps its cache from turn to turn.

        Returns:
            Session for the calls of this engine.

        Raises:
            LvlmError: what Engine.session raises.
        """
        return self.engine.session()

    def stats(self) -> EngineStats:
        """Count what the engine has done.

        Returns:
            EngineStats up to now.
        """
        return self.engine.stats()

    def memory(self) -> Memory:
        """Tell the memory that the engine takes.

        Returns:
            As of Engine.memory.
        """
        return self.engine.memory()

    async def _submit(
        self,
        index: int,
        ask: Ask,
        options: GenerationOptions,
        timeout: float | None,
        before: Sequence[AsyncHandle],
        session: Session | None,
    ) -> AsyncHandle:
        """The prompt ``index`` of a call; where the queue is full it waits for those ``before``."""
        request, handle = await asyncio.to_thread(
            self.engine.admission.prepare, index, ask, options, timeout, session
        )
        theirs = {other.handle: other for other in before}
        while (pending := self.engine.admission.enqueue(request, list(theirs))) is not None:
            await theirs[pending].wait()
        return AsyncHandle(handle)

    async def _answers(
        self,
        asks: Sequence[Ask],
        options: GenerationOptions,
        timeout: float | None,
        session: Session | None,
    ) -> list[Generation]:
        handles: list[AsyncHandle] = []
        try:
            for index, ask in enumerate(asks):
                handles.append(await self._submit(index, ask, options, timeout, handles, session))
            return [await handle for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()  # of use only if the wait was interrupted

    def __repr__(self) -> str:
        return f"<lvlm.AsyncEngine over {self.engine!r}>"

    async def close(self, *, finish: bool = False) -> None:
        """Close the engine; the event loop goes on meanwhile.

        Args:
            finish: as of Engine.close.
        """
        await asyncio.to_thread(self.engine.close, finish=finish)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()
