"""Which replica a request goes to: its key, and the order of replicas."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_tools import SAMPLES, asking, data_url

from lvlm.runtime.server.ray.preference import ranked
from lvlm.runtime.server.ray.routing_key import routing_key

CHAT = "/v1/chat/completions"


def key(body: Any, path: str = CHAT) -> str:
    return routing_key(path, body if isinstance(body, bytes) else json.dumps(body).encode())


def test_questions_about_an_image_have_its_key() -> None:
    first = key({"messages": asking("Why?", SAMPLES[0])})
    assert first.startswith("image:")
    later = [*asking("What?", SAMPLES[0]), *asking("And here?", SAMPLES[1])]
    assert key({"model": "x", "stream": True, "messages": later}) == first
    assert key({"messages": asking("Why?", SAMPLES[1])}) != first
    part = {"type": "input_image", "image_url": data_url(SAMPLES[0])}
    spoken = [{"role": "user", "content": [part]}]
    assert key({"input": spoken}, "/v1/responses") == first


def test_a_text_that_looks_like_an_image_is_none() -> None:
    text = asking('Is {"image_url": {"url": "data:image/png;base64,AA"}} an image?')
    assert key({"messages": text}).startswith("text:")


def test_large_bodies_are_not_read() -> None:
    assert key({"messages": asking("Why? " * 100_000)}) == ""
    long = key({"messages": asking("Why? " * 100_000, SAMPLES[0])})
    assert long == key({"messages": asking("Why?", SAMPLES[0])})


def test_a_conversation_keeps_its_key() -> None:
    first = key({"messages": asking("Why?")})
    assert first.startswith("text:")
    more = [*asking("Why?"), {"role": "assistant", "content": "So."}, *asking("How?")]
    assert key({"messages": more}) == first
    system = {"role": "system", "content": "Be brief."}
    assert key({"messages": [system, *asking("Why?")]}) not in ("", first)
    assert key({"input": "Why?"}, "/v1/responses").startswith("text:")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"1", b"{}"),
        *({"messages": 1}, {"messages": [1, None]}, {"messages": [{"role": "user"}] * 0}),
        {"messages": [{"content": [{"type": "image_url", "image_url": {"url": 1}}]}]},
    ],
)
def test_bodies_that_replicas_refuse_have_no_key(body: Any) -> None:
    assert key(body) == ""


def test_what_has_no_image_and_no_conversation_has_no_key() -> None:
    assert key({"prompt": "Why?"}, "/v1/completions") == ""
    assert key({"messages": asking("Why?")}, "/v1/models") == ""


def test_a_key_stays_with_its_replica() -> None:
    keys = [f"image:{n}" for n in range(300)]
    three = {name: ranked(name, dict.fromkeys("abc", 0), 4)[0] for name in keys}
    assert all(60 < list(three.values()).count(name) < 140 for name in "abc")
    two = {name: ranked(name, dict.fromkeys("ab", 0), 4)[0] for name in keys}
    assert all(two[name] == three[name] for name in keys if three[name] != "c")


def test_a_replica_with_many_more_requests_than_another_is_spared() -> None:
    order = ranked("k", dict.fromkeys("abc", 0), 4)
    first, second, third = order
    assert ranked("k", {first: 3, second: 0, third: 0}, 4) == order
    assert ranked("k", {first: 4, second: 0, third: 0}, 4)[0] == second
    assert ranked("k", {first: 9, second: 7, third: 6}, 4) == order
    assert ranked("k", {first: 9, second: 9, third: 1}, 4)[0] == third


def test_without_a_key_the_idlest_is_asked() -> None:
    assert ranked("", {"a": 3, "b": 1, "c": 2}, 4) == ["b", "c", "a"]
    assert {ranked("", {"a": 0, "b": 0}, 4)[0] for _ in range(100)} == {"a", "b"}


def test_a_replica_that_was_lost_is_asked_last() -> None:
    first, *rest = ranked("k", dict.fromkeys("abc", 0), 4)
    assert ranked("k", dict.fromkeys("abc", 0), 4, avoid=first) == [*rest, first]
    assert ranked("k", {first: 0, rest[0]: 9, rest[1]: 9}, 4, avoid=first) == [*rest, first]
    assert ranked("k", {"a": 0}, 4, avoid="a") == ["a"]
    assert ranked("k", {}, 4) == []
