"""The reader: which URLs it takes, data: URLs, and the rules it is given."""

from __future__ import annotations

import asyncio
import base64
import sys
from typing import Any

import pytest

from lvlm.core.errors import BackendError, ImageError, ParameterError
from lvlm.runtime.server.media import MediaError, MediaReader, MediaRules
from lvlm.runtime.server.media.downloads import resolve


def read(url: Any, **rules: Any) -> bytes:
    return asyncio.run(MediaReader(MediaRules(**rules)).read(url))


@pytest.mark.parametrize(
    "url", ["http://a.example/x", "HTTPS://a.example/x", "https:", "file:///etc/x", "/etc/x"]
)
def test_off_by_default(url: str) -> None:
    with pytest.raises(MediaError, match="server started with --allow-media-"):
        read(url)


@pytest.mark.parametrize(
    "url", ["", "x.png", "ftp://a.example/x", "javascript:x", ":", None, b"data:,x", 5]
)
def test_what_is_no_url(url: Any) -> None:
    with pytest.raises(MediaError, match="is no URL that can be read"):
        read(url)


def test_data_urls() -> None:
    data = bytes(range(256)) * 40
    encoded = base64.b64encode(data).decode()
    assert read(f"data:image/png;base64,{encoded}", max_bytes=len(data)) == data
    assert read(f"DATA:;base64,{encoded}") == data
    assert read("data:text/plain,a%20b") == b"a b"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:image/png;base64", "has no comma"),
        ("data:;base64,a", "no valid base64"),
        ("data:;base64,ä===", "no valid base64"),
        ("data:,\ud800", "not valid Unicode"),
    ],
)
def test_data_urls_of_nothing(url: str, says: str) -> None:
    with pytest.raises(MediaError, match=says) as error:
        read(url)
    assert isinstance(error.value, ImageError)
    assert error.value.status == 400


@pytest.mark.parametrize(
    "url", ["data:;base64," + "A" * 1_368, "data:," + "a" * 1_001, "data:," + "a" * 9_000]
)
def test_data_urls_that_are_too_large(url: str) -> None:
    with pytest.raises(MediaError, match="at most 1,000 bytes") as error:
        read(url, max_bytes=1_000)
    assert error.value.status == 413
    assert len(str(error.value)) < 300


def test_they_are_measured_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvlm.runtime.server.media.media_reader.data_of_url", None)
    with pytest.raises(MediaError, match="at most 1,000 bytes"):
        read("data:;base64," + "A" * 3_000, max_bytes=1_000)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"allow_domains": "a.example"}, "allow_domains is 'a.example'; give a list"),
        ({"allow_paths": "/media"}, "allow_paths is '/media'; give a list"),
        ({"allow_domains": ["http://a.example"]}, "give a host"),
        ({"max_bytes": 0}, "give at least 1"),
        ({"max_bytes": 1.5}, "give an integer"),
        ({"max_bytes": True}, "give an integer"),
        ({"seconds": 0}, "give a number above 0"),
        ({"seconds": float("nan")}, "give a number above 0"),
        ({"seconds": float("inf")}, "give a number above 0"),
        ({"seconds": "10"}, "give a number above 0"),
    ],
)
def test_rules_that_are_none(rules: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        MediaRules(**rules)


def test_h11_is_asked_for_where_hosts_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h11", None)
    assert read("data:,x") == b"x"
    with pytest.raises(BackendError, match=r"h11 cannot be imported .*\[serve\]"):
        MediaReader(MediaRules(allow_domains=["a.example"]))


def test_the_systems_resolver() -> None:
    """What it gives is an address that the reader refuses: no network is needed."""
    assert set(asyncio.run(resolve("localhost", 80))) <= {"127.0.0.1", "::1"}
    with pytest.raises(MediaError, match="'localhost' has no public address"):
        read("http://localhost/x", allow_domains=["localhost"])
