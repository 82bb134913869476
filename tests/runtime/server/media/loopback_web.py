"""Hosts of the web that are one server on loopback, with a resolver and connections that lead to
it and note what they are asked."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import pytest

from lvlm.runtime.server.media import MediaError, MediaReader, MediaRules
from lvlm.runtime.server.media.downloads import Streams, connector

PUBLIC = "93.184.216.34"
PUBLIC_6 = "2606:2800:220:1:248:1893:25c8:1946"
WAIT = 10
SYSTEMS = connector()  # made once: reading the system's CAs takes longer than a test

Script: TypeAlias = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Web:
    """``pages``: HOST/PATH -> what is sent. ``names``: host -> addresses, PUBLIC if not said."""

    def __init__(
        self,
        pages: Mapping[str, bytes | Script],
        names: Mapping[str, Sequence[str]] | None = None,
        server: ssl.SSLContext | None = None,
        client: ssl.SSLContext | None = None,
    ) -> None:
        self.pages = pages
        self.names = names or {}
        self.tls = server
        self.open = connector(client) if client else SYSTEMS
        self.resolved: list[tuple[str, int]] = []
        self.connected: list[tuple[str, int, str | None]] = []
        self.requests: list[bytes] = []
        self.refusing: set[str] = set()  # addresses

    def read(self, url: str, **rules: Any) -> bytes:
        async def main() -> bytes:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
            port = server.sockets[0].getsockname()[1]

            async def connect(address: str, number: int, name: str | None) -> Streams:
                self.connected.append((address, number, name))
                if address in self.refusing:
                    raise ConnectionRefusedError
                return await self.open("127.0.0.1", port, name)

            rules.setdefault("allow_domains", ["a.example", "*.a.example"])
            reader = MediaReader(MediaRules(**rules), self._resolve, connect)
            try:
                return await asyncio.wait_for(reader.read(url), WAIT)
            finally:
                server.close()

        return asyncio.run(main())

    async def _resolve(self, host: str, port: int) -> Sequence[str]:
        self.resolved.append((host, port))
        found = self.names.get(host, [PUBLIC])
        if not found:
            raise OSError("no such name")
        return found

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(head)
            target = head.split()[1].decode()
            host = head.partition(b"Host: ")[2].split(b"\r\n")[0].decode()
            page = self.pages[f"{host}{target}"]
            if isinstance(page, bytes):
                writer.write(page)
                await writer.drain()
            else:
                await page(writer)
            writer.close()


def ok(body: bytes, *headers: str) -> bytes:
    """A response, with its length unless a header says how long it is."""
    framed = any(h.lower().startswith(("content-length", "transfer-enc")) for h in headers)
    length = () if framed else (f"Content-Length: {len(body)}",)
    return "\r\n".join(("HTTP/1.1 200 OK", *headers, *length, "", "")).encode() + body


def to(location: str, status: int = 302) -> bytes:
    """A redirect."""
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


def refused(web: Web, url: str, says: str, status: int = 400, **rules: object) -> str:
    """A read that is refused, and its message."""
    with pytest.raises(MediaError, match=says) as error:
        web.read(url, **rules)
    assert error.value.status == status
    return str(error.value)
