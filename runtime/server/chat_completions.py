"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.server import asked
from lvlm.runtime.server.answered import chat_logprobs, compact, details, usage
from lvlm.runtime.server.events import DONE, EventStream, event, unless_gone
from lvlm.runtime.server.fields import ChatFields
from lvlm.runtime.server.following import AnswerUpdate, follow
from lvlm.runtime.server.patch_grids import patches
from lvlm.runtime.server.replies import Reply
from lvlm.runtime.server.service import Served, Service

router = APIRouter()


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def chat(request: Request, body: ChatFields) -> Response:
    service: Service = request.app.state.service
    served = service.find(body.model)
    request.state.model = served.name  # for the log and the metrics, also of a refusal
    service.check(served)

    async def begin() -> tuple[asked.Wanted, Handle]:
        wanted = await asked.of_chat(body, service.read, served.limits, served.skill)
        return wanted, (await service.submit(served, wanted)).handle

    wanted, handle = await unless_gone(request.receive, begin)
    reply = ChatReply(service, served, body, wanted, handle)
    if body.stream:
        return EventStream(reply.stream(), reply.left)
    return await unless_gone(request.receive, reply.whole)


class ChatReply(Reply):
    """The answers to one request."""

    def __init__(
        self,
        service: Service,
        served: Served,
        body: ChatFields,
        wanted: asked.Wanted,
        handle: Handle,
    ) -> None:
        super().__init__(service, served, [handle, *handle.others], "chatcmpl-")
        self._body, self._scored = body, wanted.options.logprobs is not None
        tools = wanted.tools
        self._readers = [None if tools is None else tools.reader() for _ in self._handles]

    async def whole(self) -> Response:
        """All at once."""
        answers, choices = await self._answers(), []
        for index, answer in enumerate(answers):
            message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
            ended: str = answer.finish_reason
            if (reader := self._readers[index]) is not None:
                told = reader.read(answer.text, ended=True)
                ended = reader.ended(ended)
                if reader.calls:
                    said = "".join(one for one in told if isinstance(one, str))
                    message |= {"content": said or None, "tool_calls": reader.calls}
            choice = {"index": index, "message": message, "finish_reason": ended}
            choices.append(choice | {"logprobs": self._logprobs(answer.token_ids, answer.scores)})
        data = self._head("chat.completion") | {"choices": choices, "usage": usage(answers)}
        if self._body.lvlm_details:
            data["lvlm"] = self._details(answers)
        return Response(compact(data), media_type="application/json")

    def stream(self) -> AsyncGenerator[bytes]:
        """The answers as they come. What goes wrong on the way is an event of its own."""
        return self._told(self._chunks(), lambda refused: event(refused.body))

    async def _chunks(self) -> AsyncGenerator[bytes]:
        for index in range(len(self._handles)):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None)
        async with aclosing(follow(self._handles)) as steps:
            async for step in steps:
                scores = self._logprobs(step.news.tokens, step.news.scores)
                deltas = self._deltas(step)
                if not deltas and self._scored and step.news.tokens:
                    deltas = [{"content": ""}]
                for delta in deltas:
                    yield self._chunk(step.index, delta, scores)
                    scores = None
                if step.ended:
                    yield self._chunk(step.index, {}, None, self._finish_reason(step.index))
        answers, options = self._ended(), self._body.stream_options
        head = self._head("chat.completion.chunk") | {"choices": []}
        if options is not None and options.include_usage:
            yield event(head | {"usage": usage(answers)})
        if self._body.lvlm_details:
            yield event(head | {"lvlm": self._details(answers)})
        yield DONE

    def _deltas(self, step: AnswerUpdate) -> list[dict[str, Any]]:
        """Deltas of an answer: text, and calls that are complete."""
        if (reader := self._readers[step.index]) is None:
            return [{"content": step.news.text}] if step.news.text else []
        before = len(reader.calls)
        deltas: list[dict[str, Any]] = []
        for told in reader.read(step.news.text, step.ended):
            if isinstance(told, str):
                deltas.append({"content": told})
            else:
                deltas.append({"tool_calls": [{"index": before} | told]})
                before += 1
        return deltas

    def _finish_reason(self, index: int) -> str:
        reason: str = self._handles[index].own_result().finish_reason
        reader = self._readers[index]
        return reason if reader is None else reader.ended(reason)

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any, ended: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": ended}
        return event(self._head("chat.completion.chunk") | {"choices": [choice]})

    def _logprobs(self, tokens: Sequence[int], scores: Sequence[Any]) -> dict[str, Any] | None:
        return chat_logprobs(self._served.tokenizer, tokens, scores) if self._scored else None

    def _details(self, answers: Sequence[Generation]) -> dict[str, Any]:
        first, handle = answers[0], self._handles[0]
        began = (handle.token_times[0] - handle.submitted) * 1e3
        stats = first.stats
        tokens = stats.prompt_tokens + stats.new_tokens - 1  # the last is not read
        tokens += stats.encoded_image_tokens - stats.image_tokens  # those that the encoder left out
        told = details(first, began, self._served.full_cache_bytes(tokens))
        return told | {"images": patches(self._served.engine.engine.manifest, first)}
