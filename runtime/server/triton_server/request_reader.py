"""From the inputs of a request to what an engine takes."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import ValidationError

from lvlm.core.errors import shown
from lvlm.runtime.server import asked
from lvlm.runtime.server.asked import Usual, Wanted
from lvlm.runtime.server.fields import ChatFields, CompletionFields, Fields
from lvlm.runtime.server.media.media_error import too_large
from lvlm.runtime.server.media.media_reader import MediaReader
from lvlm.runtime.server.media.media_rules import MediaRules
from lvlm.runtime.server.refusals import Refusal, misfit
from lvlm.runtime.server.tools import ToolSkill
from lvlm.runtime.server.triton_server.python_api import InferenceRequest, PythonApi

Body = TypeVar("Body", bound=Fields)
BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\r\n")


@dataclass(frozen=True)
class Question:
    """Question of a request. ``images`` are those of a text, messages have theirs in them; ``lead``
    is what the answer begins with."""

    wanted: Wanted
    images: list[bytes]
    stream: bool
    lead: str = ""


class Reader:
    """Reads requests. For any number of tasks of one event loop.

    Args:
        usual: what counts where a request says nothing, and its limits.
        skill: what the model can do with tools.
        media_bytes: of one image or video.
    """

    def __init__(self, api: PythonApi, usual: Usual, skill: ToolSkill, media_bytes: int) -> None:
        self._api, self._usual, self._skill, self._max_bytes = api, usual, skill, media_bytes
        self._media = MediaReader(MediaRules(max_bytes=media_bytes))

    async def read(self, request: InferenceRequest) -> Question:
        """The question. Raises Refusal, and the errors of options and prompts."""
        given = self._fields(request)
        text, messages = self._text(request, "text_input"), self._text(request, "messages")
        stream = self._switch(request, "stream", given, False)
        alone = self._switch(request, "exclude_input_in_output", given, True)
        images = self._values(request, "image")
        if (text is None) == (messages is None):
            raise Refusal(400, "give one of text_input and messages")
        if not alone and (text is None or stream):
            raise Refusal(
                400, "exclude_input_in_output is false; only whole answers to text_input can do so"
            )
        if text is not None:
            wanted, read = self._of_text(text, given), await self._images(images)
        elif images:
            raise Refusal(400, "image goes with text_input; messages have images as parts")
        else:
            body = _body(ChatFields, given | {"messages": _json("messages", str(messages))})
            wanted, read = await asked.of_chat(body, self._data, self._usual, self._skill), []
        timeout = wanted.timeout or (request.timeout() / 1e6 or None)
        lead = "" if alone or text is None else text
        return Question(replace(wanted, timeout=timeout), read, stream, lead)

    def _of_text(self, text: str, given: dict[str, Any]) -> Wanted:
        templated = given.pop("chat_template", True)
        if not isinstance(templated, bool):
            raise Refusal(400, "chat_template: give true or false")
        (wanted,) = asked.of_completion(
            _body(CompletionFields, given | {"prompt": text}), self._usual
        )
        template = templated and self._usual.options.get("chat_template", True)
        return replace(wanted, options=replace(wanted.options, chat_template=template))

    def _fields(self, request: InferenceRequest) -> dict[str, Any]:
        """The request's own parameters, and the fields of sampling_parameters."""
        given = _json("sampling_parameters", self._text(request, "sampling_parameters") or "{}")
        if not isinstance(given, dict):
            raise Refusal(400, 'sampling_parameters is no object; give {"temperature": 0.5}')
        fields: dict[str, Any] = json.loads(request.parameters() or "{}")
        return fields | given

    def _values(self, request: InferenceRequest, name: str) -> list[Any]:
        tensor = self._api.get_input_tensor_by_name(request, name)
        return [] if tensor is None else tensor.as_numpy().reshape(-1).tolist()

    def _text(self, request: InferenceRequest, name: str) -> str | None:
        values = self._values(request, name)
        if not values:
            return None
        try:
            return bytes(values[0]).decode()
        except UnicodeDecodeError:
            raise Refusal(400, f"{name} is no text in UTF-8") from None

    def _switch(
        self, request: InferenceRequest, name: str, given: Mapping[str, Any], usual: bool
    ) -> bool:
        values = self._values(request, name)
        value = values[0] if values else given.get(name)
        if not isinstance(value, bool | None):
            raise Refusal(400, f"{name} is {shown(value)}; give true or false")
        return usual if value is None else value

    async def _images(self, given: Sequence[bytes]) -> list[bytes]:
        if len(given) > self._usual.media:  # before any is read
            raise Refusal(
                400,
                f"there are {len(given)} images, and there is room for {self._usual.media}; "
                "send fewer",
            )
        return [await self._image(number, image) for number, image in enumerate(given, 1)]

    async def _image(self, number: int, given: bytes) -> bytes:
        """A file's bytes: as they are, in base64, or in a data: URL."""
        if given[:5].lower() == b"data:":
            return await self._media.read(given.decode("utf-8", "replace"))
        if given and BASE64.issuperset(given):
            try:
                given = base64.b64decode(b"".join(given.split()), validate=True)
            except binascii.Error:
                raise Refusal(400, f"image {number} is no valid base64") from None
        if len(given) > self._max_bytes:
            raise too_large(f"image {number}", self._max_bytes)
        return given

    async def _data(self, url: str) -> bytes:
        """Bytes of a part of messages."""
        if url[:5].lower() != "data:":
            raise Refusal(400, "messages: images are not fetched here; give a data: URL")
        return await self._media.read(url)


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Refusal(400, f"{name} is no JSON") from None


def _body(kind: type[Body], given: Mapping[str, Any]) -> Body:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise misfit(error.errors()[0], "sampling_parameters") from None  # type: ignore[arg-type]
