"""Content of a data: URL."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import unquote_to_bytes

from lvlm.core.errors import ImageError


def data_of_url(url: str) -> bytes:
    """The bytes in a ``data:`` URL, by base64 or percent-encoded. Raises ImageError."""
    head, comma, body = url.partition(",")
    if not comma:
        raise ImageError("the data: URL has no comma; write data:image/png;base64,…")
    try:
        data = unquote_to_bytes(body)
    except UnicodeEncodeError:
        raise ImageError("the data: URL is not valid Unicode; use base64") from None
    if not head.lower().rstrip().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("the data: URL holds no valid base64") from None
