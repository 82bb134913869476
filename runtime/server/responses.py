"""POST /v1/responses, as far as it maps: nothing is stored."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.server import asked
from lvlm.runtime.server.answered import compact, image_tokens_kept
from lvlm.runtime.server.events import EventStream, event, unless_gone
from lvlm.runtime.server.fields import ResponseFields
from lvlm.runtime.server.following import follow
from lvlm.runtime.server.output_items import OutputItems
from lvlm.runtime.server.refusals import Refusal
from lvlm.runtime.server.replies import Reply
from lvlm.runtime.server.service import Served, Service

router = APIRouter()


@router.post("/v1/responses", summary="Answer a conversation, in the newer form")
async def responses(request: Request, body: ResponseFields) -> Response:
    service: Service = request.app.state.service
    served = service.find(body.model)
    request.state.model = served.name  # for the log and the metrics, also of a refusal
    service.check(served)

    async def begin() -> tuple[asked.Wanted, Handle]:
        wanted = await asked.of_response(body, service.read, served.limits, served.skill)
        if wanted.options.n > 1:
            raise Refusal(400, "n: a response has one answer; leave n out", param="n")
        return wanted, (await service.submit(served, wanted)).handle

    wanted, handle = await unless_gone(request.receive, begin)
    answering = Answering(service, served, body, wanted, handle)
    if body.stream:
        return EventStream(answering.stream(), answering.left)
    return await unless_gone(request.receive, answering.whole)


class Answering(Reply):
    """The answer to one request."""

    def __init__(
        self,
        service: Service,
        served: Served,
        body: ResponseFields,
        wanted: asked.Wanted,
        handle: Handle,
    ) -> None:
        super().__init__(service, served, [handle], "resp_")
        self._body, self._wanted, self._events = body, wanted, 0
        self._items = OutputItems(None if wanted.tools is None else wanted.tools.reader())

    async def whole(self) -> Response:
        """All at once."""
        (answer,) = await self._answers()
        for _ in self._items.add(answer.text, ended=True):
            pass
        return Response(compact(self._response(answer)), media_type="application/json")

    def stream(self) -> AsyncGenerator[bytes]:
        """The answer as it comes, by the events of OpenAI's API."""
        return self._told(self._chunks(), self._failed)

    async def _chunks(self) -> AsyncGenerator[bytes]:
        begun = self._begun("in_progress")
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        async with aclosing(follow(self._handles)) as steps:
            async for step in steps:
                for told in self._news(step.news.text, step.ended):
                    yield told
        (answer,) = self._ended()
        ended = self._response(answer)
        yield self._event(f"response.{ended['status']}", response=ended)

    def _news(self, text: str, ended: bool) -> Iterator[bytes]:
        for kind, fields in self._items.add(text, ended):
            yield self._event(kind, **fields)

    def _failed(self, refused: Refusal) -> bytes:
        error = {"code": refused.code or "server_error", "message": refused.message}
        return self._event("response.failed", response=self._begun("failed") | {"error": error})

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._events += 1
        return event({"type": kind, "sequence_number": self._events - 1, **fields}, kind)

    def _begun(self, status: str) -> dict[str, Any]:
        tools = self._wanted.tools is not None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._served.name,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": self._body.instructions,
            "metadata": {},
            "output": [],
            "parallel_tool_calls": tools and self._body.parallel_tool_calls is not False,
            "tool_choice": (self._body.tool_choice or "auto") if tools else "none",
            "tools": self._body.tools if tools else [],
            "temperature": self._body.temperature,
            "top_p": self._body.top_p,
        }

    def _response(self, answer: Generation) -> dict[str, Any]:
        whole = answer.finish_reason == "stop"
        data = self._begun("completed" if whole else "incomplete")
        data["output"] = self._items.all(whole)
        if not whole:
            data["incomplete_details"] = {"reason": "max_output_tokens"}
        stats = answer.stats
        return data | {
            "usage": {
                "input_tokens": stats.prompt_tokens,
                "output_tokens": stats.new_tokens,
                "total_tokens": stats.prompt_tokens + stats.new_tokens,
                "input_tokens_details": {
                    "cached_tokens": stats.reused_tokens,
                    "cache_write_tokens": 0,  # the client's type has it
                    "image_tokens": stats.encoded_image_tokens,
                    "image_tokens_kept": image_tokens_kept(stats),
                },
                "output_tokens_details": {"reasoning_tokens": 0},
            }
        }
