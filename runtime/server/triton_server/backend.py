"""The model that Triton's Python backend runs: one engine, which all requests share."""

from __future__ import annotations

import asyncio
import json
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lvlm.core.errors import LvlmError, ParameterError
from lvlm.core.installing import install, require
from lvlm.runtime.engine.aio import AsyncEngine
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.server.refusals import GONE, Refusal, refusal
from lvlm.runtime.server.triton_server.figures import Figures
from lvlm.runtime.server.triton_server.model_settings import Settings
from lvlm.runtime.server.triton_server.python_api import InferenceRequest, PythonApi, Sender

if TYPE_CHECKING:
    from lvlm.runtime.server.triton_server.request_reader import Question

MAX_COMPILED = 2  # requests with a structure that are prepared at once
LOOK = 0.1  # seconds between two looks at who has cancelled


class TritonBackend:
    """Backend that TritonPythonModel hands its calls to.

    Requests are answered on an event loop in a thread of its own: ``execute`` returns at once, and
    so the engine has as many of them at a time as clients ask.
    """

    def __init__(self, api: PythonApi, args: Mapping[str, str]) -> None:
        """``api`` is the module triton_python_backend_utils, ``args`` what initialize is given.
        Raises TritonModelException."""
        self._api = api
        try:
            self._open(args)
        except LvlmError as error:
            raise api.TritonModelException(str(error)) from None
        labels = {"model_name": args["model_name"], "version": args["model_version"]}
        self._figures = Figures(api, labels)
        self._going: dict[asyncio.Task[None], Sender] = {}
        self._compiling = asyncio.Semaphore(MAX_COMPILED)
        self._loop = asyncio.new_event_loop()
        self._watching = self._loop.create_task(self._watch())
        self._thread = threading.Thread(target=self._loop.run_forever, name="lvlm-triton")
        self._thread.start()

    def _open(self, args: Mapping[str, str]) -> None:
        require("pydantic", install("serve"))
        from lvlm.runtime.server.asked import Usual
        from lvlm.runtime.server.tools import ToolSkill
        from lvlm.runtime.server.triton_server.request_reader import Reader

        given = json.loads(args["model_config"]).get("parameters", {})
        settings = Settings.of({name: one["string_value"] for name, one in given.items()})
        version = Path(args["model_repository"], args["model_version"])
        usual = settings.usual(version)
        engine = settings.open(version / settings.bundle)
        try:
            options = GenerationOptions(max_new_tokens=1, chat_template=False)
            engine.generate("Hello", options=options)  # so that the first request finds it warm
            form = engine.tool_form(usual.get("chat_template", True))
        except LvlmError:
            engine.close()
            raise
        self.engine = AsyncEngine(engine)
        room = {"max_new_tokens": engine.capacity.max_text_len}
        limits = Usual(room | usual, engine.capacity.max_images)
        skill = ToolSkill(form, engine.tokenizer)
        self._reader = Reader(self._api, limits, skill, settings.media_bytes)

    def execute(self, requests: Sequence[InferenceRequest]) -> None:
        """Begin to answer; responses go to the requests' senders."""
        for request in requests:
            answering = self._answer(request, request.get_response_sender())
            asyncio.run_coroutine_threadsafe(answering, self._loop)

    def close(self) -> None:
        """Finish what was begun. Triton, which waits for that itself, says for how long at most."""
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _answer(self, request: InferenceRequest, sender: Sender) -> None:
        """One request, however it ends: its sender gets one last response."""
        task = asyncio.current_task()
        assert task is not None
        self._going[task] = sender
        try:
            self.engine.engine.check_room()  # before images are read
            question = await self._reader.read(request)
            del request  # its inputs lie in memory that Triton shares with this process
            await self._ask(question, sender)
        except asyncio.CancelledError:
            self._refuse(sender, Refusal(GONE, "the request was cancelled"))
        except Exception as error:
            refused = refusal(error)
            if refused.status == 500:
                self._api.Logger.log_error(traceback.format_exc())
                refused = Refusal(500, "the model failed to answer; the server's log says why")
            self._refuse(sender, refused)
        finally:
            del self._going[task]

    async def _ask(self, question: Question, sender: Sender) -> None:
        from lvlm.runtime.server.tools import by_its_name
        from lvlm.runtime.server.triton_server.answering import AnswerSender

        wanted = question.wanted
        # Structures are compiled by threads that all others need, too
        async with self._compiling if wanted.options.structure else nullcontext():
            try:
                handle = await self.engine.submit(
                    wanted.prompt, question.images, options=wanted.options, timeout=wanted.timeout
                )
            except ParameterError as error:
                raise by_its_name(error, wanted.tools) from None
        handles = [handle.handle, *handle.handle.others]
        tokenizer = self.engine.engine.tokenizer
        await AnswerSender(self._api, sender, tokenizer, question, handles).send()

    def _refuse(self, sender: Sender, refused: Refusal) -> None:
        from lvlm.runtime.server.triton_server.answering import send_error

        send_error(self._api, sender, refused)

    async def _watch(self) -> None:
        """Cancel the requests whose clients are gone, which Triton has to be asked; keep the
        metrics up to date."""
        while True:
            await asyncio.sleep(LOOK)
            try:
                for task, sender in list(self._going.items()):
                    if task in self._going and sender.is_cancelled():
                        task.cancel()
                    await asyncio.sleep(0)  # others go on
                self._figures.tell(self.engine.stats())
            except Exception:  # Triton's; the next look may do
                self._api.Logger.log_error(traceback.format_exc())

    async def _drain(self) -> None:
        if self._going:
            await asyncio.wait(list(self._going))
        await self.engine.close()
        self._watching.cancel()
        with suppress(asyncio.CancelledError):
            await self._watching
