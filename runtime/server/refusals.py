"""Refusals: which status an error has, and its body in OpenAI's form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lvlm.core.errors import (
    CapacityError,
    EngineClosedError,
    ImageError,
    LvlmError,
    ParameterError,
    PromptError,
    QueueFullError,
    RequestCancelled,
    RequestTimeout,
)

LONGEST = 300  # characters of a message about a field
GONE = 499  # nginx's: the client closed the connection
RETRY_AFTER = 1  # seconds
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "cancelled_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
# The first that fits counts
STATUS: tuple[tuple[type[LvlmError], int, str | None], ...] = (
    (CapacityError, 400, "context_length_exceeded"),
    (ImageError, 400, "invalid_image"),
    (PromptError, 400, None),
    (ParameterError, 400, None),
    (QueueFullError, 429, "queue_full"),
    (EngineClosedError, 503, "shutting_down"),
    (RequestTimeout, 504, "timeout"),
    (RequestCancelled, GONE, "cancelled"),
)


class Refusal(Exception):  # noqa: N818 - an answer, too
    """A request that is refused with a status. ``param``: the field that is wrong."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else KINDS[400])
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_AFTER)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def refusal(error: Exception) -> Refusal:
    """Refusal for an error. It tells nothing of one that is not the client's own: the log has
    it."""
    if isinstance(error, Refusal):
        return error
    for kind, status, code in STATUS:
        if isinstance(error, kind):
            message = str(error)
            status = getattr(error, "status", status)  # media: what is too large
            return Refusal(status, message, param=_named(message), code=code)
    return Refusal(500, "the server failed to answer; its log says why, by the request's id")


def misfit(error: Mapping[str, Any], whole: str) -> Refusal:
    """For the first of pydantic's errors about a body, which is ``whole`` by its name."""
    place = [str(part) for part in error["loc"] if part != "body"]
    name = ".".join(place)[:LONGEST] or whole
    reason = str(error["msg"]).removeprefix("Value error, ")[:LONGEST]
    return Refusal(400, f"{name}: {reason}", param=place[0] if place else None)


def _named(message: str) -> str | None:
    """The parameter that a ParameterError's message begins with."""
    found = re.match(r"([a-z][a-z_]*) (?:is|has|and) ", message)
    return found[1] if found else None
