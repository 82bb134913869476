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
from lvlm.runtime.server.answered import compact, image_tokens_kept, new_id, now
from lvlm.runtime.server.events import EventStream, event, unless_gone
from lvlm.runtime.server.fields import ResponseFields
from lvlm.runtime.server.following import follow
from lvlm.runtime.server.refusals import Refusal, refusal
from lvlm.runtime.server.service import Served, Service

router = APIRouter()


@router.post("/v1/responses", summary="Answer a conversation, in the newer form")
async def responses(request: Request, body: ResponseFields) -> Response:
    service: Service = request.app.state.service
    served = service.find(body.model)
    request.state.model = served.name
    wanted = await asked.of_response(body, service.read, served.options)
    if wanted.options.n > 1:
        raise Refusal(400, "n: a response has one answer; leave n out", param="n")
    handle = (await service.submit(served, wanted)).handle
    answering = Answering(service, served, handle)
    if body.stream:
        return EventStream(answering.stream())
    return await unless_gone(request.receive, answering.whole)


class Answering:
    """The answer to one request."""

    def __init__(self, service: Service, served: Served, handle: Handle) -> None:
        self._service, self._served, self._handle = service, served, handle
        self._id, self._item, self._created = new_id("resp"), new_id("msg"), now()

    async def whole(self) -> Response:
        """All at once."""
        async with aclosing(follow([self._handle])) as steps:
            async for _ in steps:
                pass
        return Response(compact(self._ended(self._answer())), media_type="application/json")

    async def stream(self) -> AsyncGenerator[bytes]:
        """As it comes, by the events of OpenAI's API."""
        number = 0

        def told(kind: str, **fields: Any) -> bytes:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number - 1, **fields}, kind)

        where = {"item_id": self._item, "output_index": 0, "content_index": 0}
        part = {"type": "output_text", "text": "", "annotations": []}
        begun = self._head("in_progress") | {"output": []}
        try:
            yield told("response.created", response=begun)
            yield told("response.in_progress", response=begun)
            item = self._message("in_progress", [])
            yield told("response.output_item.added", output_index=0, item=item)
            yield told("response.content_part.added", **where, part=part)
            async with aclosing(follow([self._handle])) as steps:
                async for step in steps:
                    if step.news.text:
                        delta = {"delta": step.news.text, "logprobs": []}
                        yield told("response.output_text.delta", **where, **delta)
        except Exception as error:
            refused = refusal(error)
            self._service.metrics.refused(self._served.name, refused.status)
            failed = {"code": refused.code or "server_error", "message": refused.message}
            yield told("response.failed", response=begun | {"status": "failed", "error": failed})
            return
        answer = self._answer()
        ended = self._ended(answer)
        (item,) = ended["output"]
        (part,) = item["content"]
        yield told("response.output_text.done", **where, text=answer.text, logprobs=[])
        yield told("response.content_part.done", **where, part=part)
        yield told("response.output_item.done", output_index=0, item=item)
        yield told(f"response.{ended['status']}", response=ended)

    def _answer(self) -> Generation:
        answer = self._handle.own_result()
        self._service.metrics.answered(self._served.name, self._handle, answer)
        return answer

    def _head(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._served.name,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "temperature": None,
            "top_p": None,
        }

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        named = {"id": self._item, "type": "message", "role": "assistant"}
        return named | {"status": status, "content": content}

    def _ended(self, answer: Generation) -> dict[str, Any]:
        whole = answer.finish_reason == "stop"
        status = "completed" if whole else "incomplete"
        content = [{"type": "output_text", "text": answer.text, "annotations": [], "logprobs": []}]
        stats = answer.stats
        data = self._head(status) | {"output": [self._message(status, content)]}
        if not whole:
            data["incomplete_details"] = {"reason": "max_output_tokens"}
        return data | {
            "usage": {
                "input_tokens": stats.prompt_tokens,
                "output_tokens": stats.new_tokens,
                "total_tokens": stats.prompt_tokens + stats.new_tokens,
                "input_tokens_details": {
                    "cached_tokens": stats.reused_tokens,
                    "image_tokens": stats.encoded_image_tokens,
                    "image_tokens_kept": image_tokens_kept(stats),
                },
                "output_tokens_details": {"reasoning_tokens": 0},
            }
        }
