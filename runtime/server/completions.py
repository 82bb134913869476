"""POST /v1/completions: text goes on as it stands, without a chat template."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.server import asked
from lvlm.runtime.server.answered import added, compact, completion_logprobs, usage
from lvlm.runtime.server.events import DONE, EventStream, event, unless_gone
from lvlm.runtime.server.fields import CompletionFields
from lvlm.runtime.server.following import follow
from lvlm.runtime.server.replies import Reply
from lvlm.runtime.server.service import Served, Service

router = APIRouter()
KIND = "text_completion"


@router.post("/v1/completions", summary="Go on with a text")
async def completions(request: Request, body: CompletionFields) -> Response:
    service: Service = request.app.state.service
    served = service.find(body.model)
    request.state.model = served.name  # for the log and the metrics, also of a refusal
    service.check(served)
    wanted = asked.of_completion(body, served.limits)
    scored = wanted[0].options.logprobs is not None
    async with AsyncExitStack() as stack:
        begin = (partial(service.submit, served, one) for one in wanted)
        prompts = [
            await stack.enter_async_context(await unless_gone(request.receive, one))
            for one in begin
        ]
        handles = [[one.handle, *one.handle.others] for one in prompts]
        reply = Continued(service, served, body, scored, handles)
        if body.stream:
            stack.pop_all()  # the stream sees to the handles from now on
            return EventStream(reply.stream(), reply.left)
        return await unless_gone(request.receive, reply.whole)


class Continued(Reply):
    """The answers to one request: of each prompt as many as were asked for."""

    def __init__(
        self,
        service: Service,
        served: Served,
        body: CompletionFields,
        scored: bool,
        prompts: list[list[Handle]],
    ) -> None:
        super().__init__(service, served, [one for handles in prompts for one in handles], "cmpl-")
        self._body, self._scored, self._prompts = body, scored, prompts

    async def whole(self) -> Response:
        """All at once."""
        choices = [
            self._choice(index, answer.text, answer.finish_reason)
            | {"logprobs": self._logprobs(answer.token_ids, answer.scores, 0)}
            for index, answer in enumerate(await self._answers())
        ]
        data = self._head(KIND) | {"choices": choices, "usage": self._usage()}
        return Response(compact(data), media_type="application/json")

    def stream(self) -> AsyncGenerator[bytes]:
        """The answers as they come. What goes wrong on the way is an event of its own."""
        return self._told(self._chunks(), lambda refused: event(refused.body))

    async def _chunks(self) -> AsyncGenerator[bytes]:
        offsets = [0] * len(self._handles)
        async with aclosing(follow(self._handles)) as steps:
            async for step in steps:
                news, ended = step.news, None
                if step.ended:
                    ended = self._handles[step.index].own_result().finish_reason
                choice = self._choice(step.index, news.text, ended)
                told = self._logprobs(news.tokens, news.scores, offsets[step.index])
                offsets[step.index] += len(news.text)
                if news.text or ended or self._scored:
                    yield event(self._head(KIND) | {"choices": [choice | {"logprobs": told}]})
        self._ended()
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield event(self._head(KIND) | {"choices": [], "usage": self._usage()})
        yield DONE

    def _usage(self) -> dict[str, Any]:
        """Usage of all prompts."""
        return added(usage([handle.own_result() for handle in one]) for one in self._prompts)

    def _choice(self, index: int, text: str, ended: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "finish_reason": ended}

    def _logprobs(self, tokens: Any, scores: Any, offset: int) -> dict[str, Any] | None:
        if not self._scored:
            return None
        return completion_logprobs(self._served.tokenizer, tokens, scores, offset)
