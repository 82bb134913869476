"""Read what a client's URL of an image or video leads to."""

from __future__ import annotations

import asyncio

from lvlm.core.errors import ImageError, shown
from lvlm.runtime.media.data_url import data_of_url
from lvlm.runtime.server.media.downloads import Connect, Downloads, Resolve, connector, resolve
from lvlm.runtime.server.media.local_files import LocalFiles
from lvlm.runtime.server.media.media_error import MediaError, too_large
from lvlm.runtime.server.media.media_rules import MediaRules

_HEAD = 1_024  # characters of a data: URL that are not its data


class MediaReader:
    """Reads ``data:``, http, https and ``file://`` URLs, and absolute paths, by the rules.

    Bytes are what ``open_image`` and ``open_video`` take; whether they are an image or a video, and
    of how many pixels, is theirs to say. For any number of tasks of one event loop or several.

    Args:
        rules: what is fetched.
        resolve, connect: instead of the system's, for tests; see ``downloads.py``.

    Raises ParameterError if an allowed folder is none, BackendError if domains are allowed and h11,
    which comes with the extra ``serve``, is not installed.
    """

    def __init__(
        self, rules: MediaRules, resolve: Resolve = resolve, connect: Connect | None = None
    ) -> None:
        self._max_bytes = rules.max_bytes
        self._files = LocalFiles(rules) if rules.allow_paths else None
        self._downloads = (
            Downloads(rules, resolve, connect or connector()) if rules.allow_domains else None
        )

    async def read(self, url: str) -> bytes:
        """Bytes that the URL leads to, at most ``max_bytes``. Raises MediaError."""
        scheme = url.partition(":")[0].lower() if isinstance(url, str) else None
        if scheme == "data":
            return await asyncio.to_thread(self._in_url, url)
        if scheme in ("http", "https"):
            if self._downloads is None:
                raise _off("URLs are not downloaded", "--allow-media-domain")
            return await self._downloads.read(url)
        if scheme == "file" or (scheme is not None and url.startswith("/")):
            if self._files is None:
                raise _off("files are not read", "--allow-media-path")
            return await asyncio.to_thread(self._files.read, url)
        raise MediaError(
            f"{shown(url)} is no URL that can be read; give one of data:, https:, http: or file:"
        )

    def _in_url(self, url: str) -> bytes:
        # No more than base64 needs for so many bytes, before any of it is decoded
        if len(url) - _HEAD > self._max_bytes * 4 // 3:
            raise too_large(url, self._max_bytes)
        try:
            data = data_of_url(url)
        except ImageError as error:
            raise MediaError(str(error)) from None
        if len(data) > self._max_bytes:
            raise too_large(url, self._max_bytes)
        return data


def _off(what: str, flag: str) -> MediaError:
    return MediaError(
        f"{what} by this server; send it as a data: URL, or have the server started with {flag}"
    )
