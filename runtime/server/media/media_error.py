"""Refusals of the media of a request."""

from __future__ import annotations

from typing import Literal

from lvlm.core.errors import ImageError, shown


class MediaError(ImageError):
    """A URL of an image or video that is not followed, or leads to nothing that can be used.

    Its message is for whoever sent the URL: no address that a name resolved to, and nothing about
    files outside the folders that may be read. ``status``: of the HTTP answer.
    """

    def __init__(self, message: str = "", status: Literal[400, 413] = 400) -> None:
        super().__init__(message)
        self.status = status


def too_large(url: str, max_bytes: int) -> MediaError:
    """Refusal of an image or video of more than ``max_bytes``."""
    what = "the image or video in the data: URL" if url[:5].lower() == "data:" else shown(url, 300)
    return MediaError(
        f"{what} is too large; this server takes at most {max_bytes:,} bytes each, send a smaller "
        "or more compressed one",
        status=413,
    )
