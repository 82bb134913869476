"""POST /v1/responses, as far as it maps: nothing is stored, and there are no tools."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from lvlm.runtime.engine.handle import Handle
from lvlm.runtime.generate.answers import Generation
from lvlm.runtime.server import asked
from lvlm.runtime.server.answered import compact, image_tokens_kept, new_id
from lvlm.runtime.server.events import EventStream, event, unless_gone
from lvlm.runtime.server.fields import ResponseFields
from lvlm.runtime.server.following import follow
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

    async def begin() -> Handle:
        wanted = await asked.of_response(body, service.read, served.limits)
        if wanted.options.n > 1:
            raise Refusal(400, "n: a response has one answer; leave n out", param="n")
        return (await service.submit(served, wanted)).handle

    handle = await unless_gone(request.receive, begin)
    answering = Answering(service, served, body, handle)
    if body.stream:
        return EventStream(answering.stream(), answering.left)
    return await unless_gone(request.receive, answering.whole)


class Answering(Reply):
    """The answer to one request."""

    def __init__(
        self, service: Service, served: Served, body: ResponseFields, handle: Handle
    ) -> None:
        super().__init__(service, served, [handle], "resp_")
        self._body, self._item, self._events = body, new_id("msg_"), 0

    async def whole(self) -> Response:
        """All at once."""
        (answer,) = await self._answers()
        return Response(compact(self._response(answer)), media_type="application/json")

    def stream(self) -> AsyncGenerator[bytes]:
        """As it comes, by the events of OpenAI's API."""
        return self._told(self._chunks(), self._failed)

    async def _chunks(self) -> AsyncGenerator[bytes]:
        where = {"item_id": self._item, "output_index": 0, "content_index": 0}
        part = {"type": "output_text", "text": "", "annotations": []}
        begun = self._begun("in_progress")
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        item = self._message("in_progress", [])
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **where, part=part)
        async with aclosing(follow(self._handles)) as steps:
            async for step in steps:
                if step.news.text:
                    delta = {"delta": step.news.text, "logprobs": []}
                    yield self._event("response.output_text.delta", **where, **delta)
        (answer,) = self._ended()
        ended = self._response(answer)
        (item,) = ended["output"]
        (part,) = item["content"]
        yield self._event("response.output_text.done", **where, text=answer.text, logprobs=[])
        yield self._event("response.content_part.done", **where, part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{ended['status']}", response=ended)

    def _failed(self, refused: Refusal) -> bytes:
        error = {"code": refused.code or "server_error", "message": refused.message}
        return self._event("response.failed", response=self._begun("failed") | {"error": error})

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._events += 1
        return event({"type": kind, "sequence_number": self._events - 1, **fields}, kind)

    def _begun(self, status: str) -> dict[str, Any]:
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
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "temperature": self._body.temperature,
            "top_p": self._body.top_p,
        }

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        named = {"id": self._item, "type": "message", "role": "assistant"}
        return named | {"status": status, "content": content}

    def _response(self, answer: Generation) -> dict[str, Any]:
        whole = answer.finish_reason == "stop"
        status = "completed" if whole else "incomplete"
        content = [{"type": "output_text", "text": answer.text, "annotations": [], "logprobs": []}]
        stats = answer.stats
        data = self._begun(status) | {"output": [self._message(status, content)]}
        if not whole:
            data["incomplete_details"] = {"reason": "max_output_tokens"}
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
