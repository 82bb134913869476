"""What a request is routed by: its first picture, else how its conversation begins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

PATHS = ("/v1/chat/completions", "/v1/responses")
PARTS = ("image_url", "input_image", "video_url")


def routing_key(path: str, body: bytes) -> str:
    """A hash that is the same for all requests with the same first picture, by its URL, and for all
    that continue a conversation without one. "" where nothing is kept for the next request.

    Nothing is checked here: a body that is wrong has some key or none, and is refused by a replica.
    """
    if path not in PATHS:
        return ""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(asked, dict):
        return ""
    messages = asked.get("messages", asked.get("input"))
    if isinstance(messages, str):
        return _hash("text", messages)
    if not isinstance(messages, list):
        return ""
    url = next(_urls(messages), None)
    return _hash("picture", url) if url is not None else _beginning(messages)


def _urls(messages: list[Any]) -> Iterator[str]:
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in PARTS:
                found = part.get("image_url" if kind == "input_image" else kind)
                url = found.get("url") if isinstance(found, Mapping) else found
                if isinstance(url, str):
                    yield url


def _beginning(messages: list[Any]) -> str:
    """All up to the user's first message, which later turns begin with, too."""
    roles = [one.get("role") if isinstance(one, Mapping) else None for one in messages]
    if "user" not in roles:
        return ""
    begin = messages[: roles.index("user") + 1]
    try:
        return _hash("text", json.dumps(begin))
    except RecursionError:
        return ""


def _hash(kind: str, text: str) -> str:
    data = text.encode("utf-8", "surrogatepass")
    return kind + ":" + hashlib.blake2b(data, digest_size=16).hexdigest()
