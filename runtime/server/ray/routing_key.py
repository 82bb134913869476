"""Key that a request is routed by: its first image, else how its conversation begins."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

PATHS = ("/v1/chat/completions", "/v1/responses")
# Not within a text, where quotes are escaped
URL = re.compile(rb'"(?:url|image_url)"\s*:\s*"')
MAX_READ = 256 << 10  # bytes of a body that is read as JSON: all requests pass through here


def routing_key(path: str, body: bytes) -> str:
    """A hash that is the same for all requests with the same first image, by its URL as it is
    written, and for all that continue a conversation without one. "" where nothing is kept for the
    next request.

    Nothing is checked here: a body that is wrong has some key or none, and is refused by a replica.
    """
    if path not in PATHS:
        return ""
    found = URL.search(body)
    if found is not None:
        end = body.find(b'"', found.end())
        return _hash("image", memoryview(body)[found.end() : end])
    return _beginning(body) if len(body) <= MAX_READ else ""


def _beginning(body: bytes) -> str:
    """Key of all up to the user's first message, which later turns begin with, too."""
    try:
        asked = json.loads(body)
        given = asked.get("messages", asked.get("input")) if isinstance(asked, dict) else None
        if isinstance(given, str):
            return _hash("text", json.dumps(given).encode())
        if not isinstance(given, list):
            return ""
        roles = [_role(message) for message in given]
        begin = given[: roles.index("user") + 1]
        return _hash("text", json.dumps(begin).encode())
    except (ValueError, RecursionError):  # no user's, too
        return ""


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _hash(kind: str, data: bytes | memoryview) -> str:
    return kind + ":" + hashlib.blake2b(data, digest_size=16).hexdigest()
