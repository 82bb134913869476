"""Output of /v1/responses: messages and calls, and the events that tell of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lvlm.runtime.server.answered import new_id
from lvlm.runtime.server.tools import AnswerReader

Event = tuple[str, dict[str, Any]]


class OutputItems:
    """Output items of an answer so far. ``reader`` tells calls from text, where there are tools."""

    def __init__(self, reader: AnswerReader | None) -> None:
        self._reader = reader
        self._items: list[dict[str, Any]] = []
        self._open = False  # the last one is a message that goes on

    def add(self, text: str, ended: bool) -> Iterator[Event]:
        """Events of what is new in the answer; at its end the last message is closed."""
        if self._reader is None:
            news: list[str | dict[str, Any]] = [text] if text else []
        else:
            news = self._reader.read(text, ended)
        for one in news:
            yield from self._said(one) if isinstance(one, str) else self._called(one)
        if ended:
            if not self._items:
                yield from self._begin()
            yield from self._close()

    def all(self, whole: bool) -> list[dict[str, Any]]:
        """Them all; of an answer that is not ``whole``, the last message is not complete."""
        status = "completed" if whole else "incomplete"
        return [
            one | {"status": status} if one["type"] == "message" else one for one in self._items
        ]

    def _said(self, text: str) -> Iterator[Event]:
        if not self._open:
            yield from self._begin()
        self._items[-1]["content"][0]["text"] += text
        yield "response.output_text.delta", self._place() | {"delta": text, "logprobs": []}

    def _begin(self) -> Iterator[Event]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"id": new_id("msg_"), "type": "message", "role": "assistant"}
        self._items.append(item | {"status": "in_progress", "content": [part]})
        self._open = True
        begun = self._items[-1] | {"content": []}
        yield "response.output_item.added", {"output_index": self._last, "item": begun}
        yield "response.content_part.added", self._place() | {"part": dict(part)}

    def _close(self) -> Iterator[Event]:
        if not self._open:
            return
        self._open = False
        item = self._items[-1]
        item["status"] = "completed"
        (part,) = item["content"]
        text = {"text": part["text"], "logprobs": []}
        yield "response.output_text.done", self._place() | text
        yield "response.content_part.done", self._place() | {"part": part}
        yield "response.output_item.done", {"output_index": self._last, "item": item}

    def _called(self, call: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        function = call["function"]
        item = {"id": new_id("fc_"), "type": "function_call", "status": "completed"}
        item |= {"call_id": call["id"], "name": function["name"]}
        self._items.append(item | {"arguments": function["arguments"]})
        begun = item | {"status": "in_progress", "arguments": ""}
        where = {"item_id": item["id"], "output_index": self._last}
        whole = {"arguments": function["arguments"]}
        yield "response.output_item.added", {"output_index": self._last, "item": begun}
        yield "response.function_call_arguments.delta", where | {"delta": function["arguments"]}
        yield "response.function_call_arguments.done", where | {"name": item["name"]} | whole
        yield "response.output_item.done", {"output_index": self._last, "item": self._items[-1]}

    @property
    def _last(self) -> int:
        return len(self._items) - 1

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": self._last, "content_index": 0}
