"""URLs of http and https: one spelling, and the hosts that are allowed."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lvlm.core.errors import ParameterError
from lvlm.runtime.server.media.media_error import MediaError
from lvlm.runtime.server.media.web_url import Domain, WebUrl


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://a.example/x.png", WebUrl("https", "a.example", 443, "/x.png")),
        ("HTTP://A.Example", WebUrl("http", "a.example", 80, "/")),
        ("https://a.example:8443/x?y=/@:#z", WebUrl("https", "a.example", 8443, "/x?y=/@:")),
        ("https://a.example?y", WebUrl("https", "a.example", 443, "/?y")),
        (
            "https://a.example/ä b".replace(" ", "%20"),
            WebUrl("https", "a.example", 443, "/%C3%A4%20b"),
        ),
        ("https://a.example/\\..", WebUrl("https", "a.example", 443, "/%5C..")),
        ("https://xn--bcher-kva.example", WebUrl("https", "xn--bcher-kva.example", 443, "/")),
        ("https://1.a-1.b2", WebUrl("https", "1.a-1.b2", 443, "/")),
    ],
)
def test_what_is_read(text: str, url: WebUrl) -> None:
    assert WebUrl.of(text) == url
    assert WebUrl.of(str(url)) == url


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("https://", "name its host"),
        ("https:/a.example", "give https://HOST/PATH"),
        ("https:a.example", "give https://HOST/PATH"),
        ("gopher://a.example", "give https://HOST/PATH"),
        ("https://me@a.example/", "a user name or password"),
        ("https://me:secret@a.example/", "a user name or password"),
        ("https://a.example\\@b.example/", "a user name or password"),
        ("https://a.example\\.b.example/", "name its host"),
        ("https://a.example:80:80/", "no number"),
        ("https://a.example:/", "no number"),
        ("https://a.example:+80/", "no number"),
        ("https://a.example:٨٠/", "name its host"),
        ("https://a.example:123456/", "no number"),
        ("https://a.example/a b", "%20"),
        (" https://a.example/", "%20"),
        ("https://a.exa\tmple/", "%20"),
        ("https://a.example/\r\nHost: b", "%20"),
        ("https://a.example/\ud800", "not valid Unicode"),
        ("https://a.example/" + "a" * 9_000, "at most 8,192"),
        *((f"http://{host}/", "not by an address") for host in (
            "127.0.0.1",
            "8.8.8.8",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0x7f.0.0.1",
            "0177.0.0.1",
            "1.2.3.0x4",
            "127.0.0.1.",
            "[::1]",
            "[fe80::1%25eth0]",
            "[::ffff:127.0.0.1]",
            "bücher.example",
            "a.example。b",
            "①.example",
            "\u212a.example",  # the Kelvin sign, whose lower case is a k
            "a..example",
            ".a.example",
            "a.example.",
            "-a.example",
            "a-.example",
            "a_b.example",
            "a%2eexample",
            "a" * 64 + ".example",
            ".".join(["a" * 50] * 6),
        )),
    ],
)  # fmt: skip
def test_what_is_not(text: str, says: str) -> None:
    with pytest.raises(MediaError, match=says) as error:
        WebUrl.of(text)
    assert "secret" not in str(error.value)
    assert error.value.status == 400


PIECES = st.sampled_from(
    [*"ab.:/?#@[]%\\-_~ \t", "example", "80", "://", "127.0.0.1", "\u017f", "\u212a", "\udc80"]
)


@given(st.lists(PIECES, max_size=12).map("".join), st.sampled_from(["http", "https", "HTTP"]))
@example("a.example\\@b", "http")
def test_whatever_is_read_is_plain(rest: str, scheme: str) -> None:
    try:
        url = WebUrl.of(f"{scheme}://{rest}")
    except MediaError:
        return
    assert set(url.host) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
    assert url.host.rpartition(".")[2][0].isalpha()
    assert url.target.startswith("/")
    assert all("!" <= c <= "~" for c in url.target)


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/y", "https://a.example/y"),
        ("y?z#w", "https://a.example/x/y?z"),
        ("//b.example/y", "https://b.example/y"),
        ("https://b.example", "https://b.example/"),
    ],
)
def test_redirects(location: str, target: str) -> None:
    assert str(WebUrl.of("https://a.example/x/").redirected(location)) == target


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("http://a.example/", "from https to http"),
        ("file:///etc/passwd", "give https://HOST/PATH"),
        ("data:,x", "give https://HOST/PATH"),
        ("//127.0.0.1/", "not by an address"),
        ("//me@a.example/", "user name"),
        ("//[", "cannot be used"),
        ("/a b", "%20"),
    ],
)
def test_redirects_that_are_refused(location: str, says: str) -> None:
    with pytest.raises(MediaError, match=says):
        WebUrl.of("https://a.example/x").redirected(location)


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        (
            "A.example",
            ["https://a.example", "http://a.example", "http://A.EXAMPLE:443"],
            ["https://b.a.example", "https://xa.example", "https://a.example:8443", "https://a.example.b"],
        ),
        (
            "*.a.example",
            ["https://b.a.example", "https://c.b.a.example:80"],
            ["https://a.example", "https://xa.example", "https://b.a.example:81"],
        ),
        ("a.example:8443", ["https://a.example:8443"], ["https://a.example", "http://a.example"]),
    ],
)  # fmt: skip
def test_domains(domain: str, inside: list[str], outside: list[str]) -> None:
    entry = Domain.of(domain)
    assert [url for url in inside if not entry.has(WebUrl.of(url))] == []
    assert [url for url in outside if entry.has(WebUrl.of(url))] == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "*.",
        "a.*",
        ".a.example",
        "https://a.example",
        "a.example/",
        "a.example:0",
        "a:65536",
        "127.0.0.1",
        "bücher.example",
        "a example",
        5,
    ],
)
def test_domains_that_are_none(text: str) -> None:
    with pytest.raises(ParameterError, match="give a host"):
        Domain.of(text)
