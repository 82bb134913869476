"""Download from hosts that are allowed, at addresses that are public.

A name is resolved once, and the connection goes to the address that was checked: a second answer of
a name server could be another one. Each redirect is a new URL, checked as the first one is.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from socket import SOCK_STREAM
from typing import Any, TypeAlias

from lvlm.core.errors import shown
from lvlm.core.installing import install, require
from lvlm.runtime.server.media.media_error import MediaError, too_large
from lvlm.runtime.server.media.media_rules import MediaRules
from lvlm.runtime.server.media.public_addresses import public_address
from lvlm.runtime.server.media.web_url import WebUrl

Resolve: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> its addresses. OSError if there are none."""
Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect: TypeAlias = Callable[[str, int, str | None], Awaitable[Streams]]
"""(address, port, name): by TLS if there is a name, which the certificate must have. OSError."""

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 16_384  # bytes read at once, and of a response's head: nearly twice as many pass


async def resolve(host: str, port: int) -> Sequence[str]:
    """The system's resolver, in a thread. See Resolve."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def connector(context: ssl.SSLContext | None = None) -> Connect:
    """Plain asyncio connections, without proxies. ``context``: None trusts the system's CAs."""
    trusted = context or ssl.create_default_context()

    async def connect(address: str, port: int, name: str | None) -> Streams:
        return await asyncio.open_connection(
            address, port, ssl=trusted if name else None, server_hostname=name
        )

    return connect


class Downloads:
    """Bodies of http and https URLs.

    Args:
        rules: what is allowed, and how much.
        resolve, connect: instead of the network, for tests.

    Raises BackendError if h11 is not installed.
    """

    def __init__(self, rules: MediaRules, resolve: Resolve, connect: Connect) -> None:
        self._rules = rules
        self._resolve = resolve
        self._connect = connect
        self._h11 = require("h11", install("serve"))

    async def read(self, text: str) -> bytes:
        """The body that a URL leads to. Raises MediaError."""
        url = WebUrl.of(text)
        try:
            async with asyncio.timeout(self._rules.seconds):
                return await self._followed(url)
        except TimeoutError:
            raise MediaError(
                f"{url.origin} did not send it within {self._rules.seconds:g} seconds; try again, "
                "or send it as a data: URL"
            ) from None

    async def _followed(self, url: WebUrl) -> bytes:
        first = url
        for _ in range(MAX_REDIRECTS + 1):
            self._check_host(url)
            reader, writer = await self._connected(url)
            try:
                found = await self._exchange(url, reader, writer)
            except OSError:
                raise MediaError(f"{url.origin} closed the connection; try again") from None
            except self._h11.ProtocolError:
                raise MediaError(
                    f"{url.origin} does not answer in valid HTTP, or not to the end; try again, "
                    "or send it as a data: URL"
                ) from None
            finally:
                writer.transport.abort()  # close() would wait for a peer that need not answer
            if isinstance(found, bytes):
                return found
            url = url.redirected(found)
        raise MediaError(
            f"{first.origin} redirects more than {MAX_REDIRECTS} times; give the last URL"
        )

    def _check_host(self, url: WebUrl) -> None:
        if not any(domain.has(url) for domain in self._rules.domains):
            raise MediaError(
                f"this server does not download from {shown(url.address)}; send it as a data: URL, "
                "or have the server started with --allow-media-domain"
            )

    async def _connected(self, url: WebUrl) -> Streams:
        name = url.host if url.scheme == "https" else None
        for address in await self._addresses(url):
            try:
                return await self._connect(address, url.port, name)
            except ssl.SSLCertVerificationError:
                raise MediaError(
                    f"the certificate of {url.origin} is not valid; send it as a data: URL"
                ) from None
            except OSError:
                continue
        raise MediaError(f"{url.origin} cannot be reached; check the URL, or try again")

    async def _addresses(self, url: WebUrl) -> list[str]:
        """Addresses of its host, all of them public."""
        try:
            given = await self._resolve(url.host, url.port)
        except (OSError, ValueError):
            given = ()
        found = [public_address(address) for address in given]
        public = [address for address in found if address is not None]
        # One message: which names there are in the server's own network is nobody's business
        if not public or len(public) < len(found):
            raise MediaError(
                f"{shown(url.host)} has no public address; check it, or send it as a data: URL"
            )
        return list(dict.fromkeys(public))

    async def _exchange(
        self, url: WebUrl, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes | str:
        """The body of the response, or the text of where it redirects to."""
        h11 = self._h11
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_PIECE)
        headers = {
            "Host": url.address,
            "User-Agent": "lvlm",
            "Accept": "*/*",
            "Accept-Encoding": "identity",  # a small body may unpack to any size
            "Connection": "close",
        }
        request = h11.Request(method="GET", target=url.target, headers=list(headers.items()))
        writer.write(http.send(request) + http.send(h11.EndOfMessage()))
        await writer.drain()
        body = bytearray()
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await reader.read(_PIECE))
            elif isinstance(event, h11.Response):
                location = self._check_response(url, event)
                if location is not None:
                    return location
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self._rules.max_bytes:
                    raise too_large(url.origin, self._rules.max_bytes)
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body)

    def _check_response(self, url: WebUrl, response: Any) -> str | None:
        """URL that a response redirects to; None if its body is what was asked for."""
        named = [(bytes(name).lower(), bytes(value)) for name, value in response.headers]
        if response.status_code in _REDIRECTS:
            places = {value for name, value in named if name == b"location"}
            try:
                (place,) = places
                return place.decode()
            except ValueError:
                raise MediaError(f"{url.origin} redirects to no URL; give another one") from None
        if response.status_code != 200:
            raise MediaError(
                f"{url.origin} answers with status {response.status_code}; give a URL that needs "
                "no login and leads to the file itself"
            )
        coding = {value.strip().lower() for name, value in named if name == b"content-encoding"}
        if coding - {b"identity", b""}:
            raise MediaError(
                f"{url.origin} sends it compressed (Content-Encoding), though asked not to; send "
                "it as a data: URL"
            )
        length = next((value for name, value in named if name == b"content-length"), b"0")
        if int(length) > self._rules.max_bytes:  # digits, at most 20: h11 has seen to it
            raise too_large(url.origin, self._rules.max_bytes)
        return None
