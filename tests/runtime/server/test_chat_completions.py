"""Chat completions through OpenAI's client, against the engine's own answers."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from server_tools import QUESTION, SAMPLES, Running, asking, picture

TURNS = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [picture(), {"type": "text", "text": "Read the top row."}]},
    {"role": "assistant", "content": "8"},
    {"role": "user", "content": [{"type": "text", "text": "And this?"}, picture(SAMPLES[1])]},
]
OWN_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [
        {"type": "image", "image": SAMPLES[0]}, {"type": "text", "text": "Read the top row."}]},
    {"role": "assistant", "content": "8"},
    {"role": "user", "content": [
        {"type": "text", "text": "And this?"}, {"type": "image", "image": SAMPLES[1]}]},
]  # fmt: skip
OWN = [
    {"role": "user", "content": [
        {"type": "image", "image": SAMPLES[0]}, {"type": "text", "text": QUESTION}]},
]  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "own"), [(asking(QUESTION, SAMPLES[0]), OWN), (TURNS, OWN_TURNS)]
)
def test_answers_are_the_engines(
    messages: Any, own: Any, client: openai.OpenAI, server: Running
) -> None:
    """Whole and as a stream, and what is told of them."""
    expected = server.engine.generate(own, max_new_tokens=9, ignore_eos=True)
    options: Any = {"model": "tiny", "messages": messages, "extra_body": {"ignore_eos": True}}
    options["max_completion_tokens"] = 9
    answer = client.chat.completions.create(**options)
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.stats.prompt_tokens
    assert answer.usage.completion_tokens == 9
    told = answer.usage.prompt_tokens_details
    assert told is not None
    assert told.image_tokens == told.image_tokens_kept == expected.stats.image_tokens  # type: ignore[attr-defined]
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert last.choices == []
    assert last.usage.completion_tokens == 9
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.text
    assert [c.choices[0].finish_reason for c in chunks[-2:]] == [None, "length"]
    assert len({c.id for c in chunks}) == 1


def test_several_answers_are_those_of_seeded_lone_runs(
    client: openai.OpenAI, server: Running
) -> None:
    messages = asking(QUESTION, SAMPLES[0])
    options: Any = {"model": "tiny", "messages": messages, "temperature": 1.5, "max_tokens": 8}
    expected = server.engine.generate(
        OWN, temperature=1.5, seed=7, n=3, max_new_tokens=8, ignore_eos=True
    )
    texts = [one.text for one in (expected, *expected.others)]
    options |= {"seed": 7, "n": 3, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(**options)
    assert [choice.message.content for choice in answer.choices] == texts
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    found = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            found[choice.index] += choice.delta.content or ""
    assert found == texts


def test_logprobs(client: openai.OpenAI, server: Running) -> None:
    expected = server.engine.generate(OWN, max_new_tokens=5, logprobs=2)
    options: Any = {"model": "tiny", "messages": asking(QUESTION, SAMPLES[0]), "max_tokens": 5}
    options |= {"logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(**options)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [t.logprob for t in logprobs.content] == [s.logprob for s in expected.scores]
    for told, score in zip(logprobs.content, expected.scores, strict=True):
        assert [top.logprob for top in told.top_logprobs] == [value for _, value in score.top]
        assert told.bytes == list(told.token.encode())
    # Those of a stream, one after the other, are the same
    streamed = [
        token
        for chunk in client.chat.completions.create(**options, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or ()
    ]
    assert [(t.token, t.logprob) for t in streamed] == [
        (t.token, t.logprob) for t in logprobs.content
    ]


def test_stops_and_penalties_reach_the_engine(client: openai.OpenAI, server: Running) -> None:
    given: dict[str, Any] = {"stop": ["5"], "frequency_penalty": 1.5, "presence_penalty": 0.5}
    expected = server.engine.generate(
        "Why?", max_new_tokens=12, ignore_eos=True, logit_bias={5: 20.0}, **given
    )
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Why?"}],
        max_tokens=12,
        logit_bias={"5": 20},
        extra_body={"ignore_eos": True, "unknown_field": {"a": 1}},
        **given,
    )
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason


def test_details(client: openai.OpenAI) -> None:
    answer: Any = client.chat.completions.create(
        model="tiny",
        messages=asking(QUESTION, SAMPLES[0]),  # type: ignore[arg-type]
        max_tokens=3,
        extra_body={"lvlm_details": True},
    )
    told = answer.lvlm
    assert told["image_tokens"] == 144
    assert told["cache_bytes"] == told["full_cache_bytes"] > 0
    assert told["images"][0]["patches"] == [0] * 144
    assert len(told["tokens_per_layer"]) == len(told["kept_per_layer"]) == 6
