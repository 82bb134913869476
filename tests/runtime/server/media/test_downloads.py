"""Downloads: where connections go, what is followed, and how much is read."""

from __future__ import annotations

import asyncio
import contextlib
import gzip

import pytest
from loopback_web import PUBLIC, PUBLIC_6, Web, ok, refused, to

from lvlm.runtime.server.media.downloads import Streams
from lvlm.runtime.server.media.media_error import MediaError

X = "http://a.example/x"
BODY = bytes(range(256)) * 100


@pytest.mark.parametrize(
    "page",
    [
        ok(BODY),
        ok(BODY, "Content-Encoding: identity", "X: Y"),
        ok(BODY, "Content-Length: 25600", "Content-Length: 25600"),
        b"HTTP/1.0 200 OK\r\n\r\n" + BODY,  # to the connection's end
        b"HTTP/1.1 103 Early Hints\r\nLink: </y>\r\n\r\n" + ok(BODY),
        ok(b"6400\r\n" + BODY + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    ],
)
def test_what_is_read(page: bytes) -> None:
    web = Web({"a.example/x": page})
    assert web.read(X, max_bytes=len(BODY)) == BODY
    assert web.resolved == [("a.example", 80)]
    assert web.connected == [(PUBLIC, 80, None)]


def test_what_is_sent() -> None:
    web = Web({"b.a.example:8080/x?y=%C3%A4": ok(b"")})
    assert web.read("http://B.a.example:8080/x?y=ä#z", allow_domains=["*.a.example:8080"]) == b""
    (request,) = web.requests
    assert request.split(b"\r\n") == [
        b"GET /x?y=%C3%A4 HTTP/1.1",
        b"Host: b.a.example:8080",
        b"User-Agent: lvlm",
        b"Accept: */*",
        b"Accept-Encoding: identity",
        b"Connection: close",
        b"",
        b"",
    ]


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_no_proxy_is_used(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    assert Web({"a.example/x": ok(b"x")}).read(X) == b"x"


# Where connections go


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        [PUBLIC, "10.0.0.7"],  # any of them
        ["169.254.169.254", PUBLIC],
        ["::1"],
        ["fe80::1%eth0"],
        ["::ffff:192.168.0.1"],
        ["64:ff9b::a00:7"],
        ["0.0.0.0"],
        ["nonsense"],
        [],  # resolves to nothing: the same message
    ],
)
def test_names_of_addresses_that_are_not_public(addresses: list[str]) -> None:
    web = Web({}, {"a.example": addresses})
    message = refused(web, X, "'a.example' has no public address")
    assert message == refused(Web({}, {"a.example": []}), X, "no public address")
    assert web.connected == []
    assert web.resolved == [("a.example", 80)]


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    """A name server that answers with another one the second time is not asked a second time."""
    web = Web({"a.example/x": ok(b"x")})
    answers = iter([[PUBLIC_6, PUBLIC, PUBLIC], ["127.0.0.1"]])

    async def rebinding(host: str, port: int) -> list[str]:
        web.resolved.append((host, port))
        return next(answers)

    web._resolve = rebinding  # type: ignore[method-assign]
    web.refusing = {PUBLIC_6}
    assert web.read(X) == b"x"
    assert web.resolved == [("a.example", 80)]
    assert web.connected == [(PUBLIC_6, 80, None), (PUBLIC, 80, None)]


def test_an_address_in_another_spelling_is_connected_to_in_its_own() -> None:
    web = Web({"a.example/x": ok(b"x")}, {"a.example": [f"::ffff:{PUBLIC}"]})
    assert web.read(X) == b"x"
    assert web.connected == [(PUBLIC, 80, None)]


def test_nobody_listens() -> None:
    web = Web({}, {"a.example": [PUBLIC, PUBLIC_6]})
    web.refusing = {PUBLIC, PUBLIC_6}
    refused(web, X, "http://a.example cannot be reached")
    assert len(web.connected) == 2


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://b.example/x", "does not download from 'b.example'"),
        ("http://a.example:8080/x", "does not download from 'a.example:8080'"),
        ("http://me:you@a.example/x", "user name or password"),
        ("http://2130706433/x", "not by an address"),
    ],
)
def test_hosts_that_are_not_asked_for(url: str, says: str) -> None:
    web = Web({})
    refused(web, url, says)
    assert web.resolved == web.connected == []


# Redirects


def test_redirects_are_followed() -> None:
    pages = {
        "a.example/x": to("/y", 301),
        "a.example/y": to("//b.a.example/z", 307),
        "b.a.example/z": to("w?v", 308),
        "b.a.example/w?v": ok(b"found"),
    }
    web = Web(pages)
    assert web.read(X) == b"found"
    hosts = ["a.example", "a.example", "b.a.example", "b.a.example"]
    assert web.resolved == [(host, 80) for host in hosts]  # once each


def test_redirects_without_end() -> None:
    web = Web({"a.example/x": to("/x")})
    refused(web, X, "redirects more than 3 times")
    assert len(web.requests) == 4


@pytest.mark.parametrize(
    ("page", "says"),
    [
        (to("http://b.example/"), "does not download from 'b.example'"),
        (to("http://inner.a.example/"), "'inner.a.example' has no public address"),
        (to("http://127.0.0.1/"), "not by an address"),
        (to("http://[::1]/"), "not by an address"),
        (to("http://a.example:22/"), "does not download from 'a.example:22'"),
        (to("file:///etc/passwd"), "redirects to what cannot be used"),
        (to("http://a.example/\xe4".encode().decode("latin-1")), "status 404"),
        (b"HTTP/1.1 302 Found\r\nLocation: /\xff\r\n\r\n", "redirects to no URL"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "redirects to no URL"),
        (b"HTTP/1.1 302 Found\r\nLocation: /y\r\nLocation: /z\r\n\r\n", "redirects to no URL"),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", "status 304"),
        (b"HTTP/1.1 300 Choices\r\nLocation: /y\r\n\r\n", "status 300"),
    ],
)
def test_redirects_that_are_not_followed(page: bytes, says: str) -> None:
    gone = b"HTTP/1.1 404 Not Found\r\n\r\n"
    pages = {"a.example/x": page, "a.example/%C3%A4": gone, "a.example/%C3%83%C2%A4": gone}
    web = Web(pages, {"inner.a.example": ["10.1.2.3"]})
    message = refused(web, X, says)
    assert "10.1.2.3" not in message
    assert len(web.connected) == len(web.requests)


# What is answered


@pytest.mark.parametrize(
    ("page", "says"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "status 404"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1\r\n\r\nx", "status 206"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "status 204"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "valid HTTP"),
        (b"", "valid HTTP"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "valid HTTP"),
        (b"<html>no head</html>", "valid HTTP"),
        (ok(b"x", "No colon"), "valid HTTP"),
        (ok(b"x", "Na\0me: x"), "valid HTTP"),
        (ok(b"x", "Content-Length: -1"), "valid HTTP"),
        (ok(b"x", "Content-Length: 1", "Content-Length: 2"), "valid HTTP"),
        (ok(b"x", "Content-Length: 2"), "not to the end"),
        (ok(b"zz\r\nx", "Transfer-Encoding: chunked"), "valid HTTP"),
        (ok(b"5\r\nx", "Transfer-Encoding: chunked"), "not to the end"),
        (ok(b"x", "Transfer-Encoding: gzip, chunked"), "valid HTTP"),
        (ok(b"x", "A: " + "a" * 40_000), "valid HTTP"),
        (ok(b"x", *[f"A{i}: {'a' * 90}" for i in range(500)]), "valid HTTP"),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 2_000, "valid HTTP"),
        (ok(gzip.compress(bytes(1_000_000)), "Content-Encoding: gzip"), "compressed"),
        (ok(b"x", "content-encoding: identity", "Content-Encoding: BR"), "compressed"),
    ],
)
def test_answers_that_are_refused(page: bytes, says: str) -> None:
    refused(Web({"a.example/x": page}), X, says)


CHUNK = b"100\r\n" + bytes(256) + b"\r\n"


@pytest.mark.parametrize(
    "page",
    [
        ok(b"x", "Content-Length: 1001"),  # at once: no more is sent
        ok(bytes(1_001)),
        b"HTTP/1.1 200 OK\r\n\r\n" + bytes(1_001),
        ok(CHUNK * 4, "Transfer-Encoding: chunked"),  # 1,024, with no end
    ],
)
def test_too_large(page: bytes) -> None:
    refused(Web({"a.example/x": page}), X, "at most 1,000 bytes", status=413, max_bytes=1_000)


def test_a_body_without_end() -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(65_536))
            await writer.drain()

    web = Web({"a.example/x": endless})
    refused(web, X, "at most 1,000,000 bytes", status=413, max_bytes=1_000_000)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nA: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_byte_by_byte(sent: bytes) -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        writer.write(sent or b"H")
        while sent:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)
        await asyncio.Event().wait()

    refused(Web({"a.example/x": slow}), X, "within 0.3 seconds", seconds=0.3)


def test_the_time_is_that_of_all_hops() -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        writer.write(to("/x"))

    refused(Web({"a.example/x": slow}), X, "within 0.3 seconds", seconds=0.3)


@pytest.mark.parametrize("page", [ok(b"x"), ok(bytes(99)), b"HTTP/1.1 200 OK\r\nA: ", to("/y")])
def test_connections_are_closed(page: bytes) -> None:
    async def and_stay(writer: asyncio.StreamWriter) -> None:
        writer.write(page)
        await asyncio.Event().wait()

    writers = []
    web = Web({"a.example/x": and_stay, "a.example/y": ok(b"x")})
    opened = web.open

    async def noted(address: str, port: int, name: str | None) -> Streams:
        reader, writer = await opened(address, port, name)
        writers.append(writer)
        return reader, writer

    web.open = noted
    with contextlib.suppress(MediaError):
        web.read(X, max_bytes=9, seconds=0.3)
    assert writers
    assert all(writer.transport.is_closing() for writer in writers)
