"""From a body to what an engine takes: messages with their images read, and options."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lvlm.core.errors import CapacityError, ParameterError
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.messages import OWN_KEYS
from lvlm.runtime.prompt.tools.tool_calls import all_texts
from lvlm.runtime.server.fields import (
    MAX_ITEMS,
    ChatFields,
    CompletionFields,
    ResponseFields,
    Sampled,
    Structured,
)
from lvlm.runtime.server.refusals import Refusal
from lvlm.runtime.server.tools import (
    AskedTools,
    ToolSkill,
    add_tools,
    called_before,
    of_responses,
)

Read = Callable[[str], Awaitable[bytes]]  # of the URL of an image or a video

MAX_LOGPROBS = 20  # as in OpenAI's API
MAX_STOPS = 64
LONGEST_TOKEN = 128  # characters: so many spaces in a row are one of some vocabularies
# Field -> option, where the names differ
OPTION_NAMES = {"min_tokens": "min_new_tokens"}
SAME = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos"),
    *("n", "min_tokens", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("keep", "kv_keep"),
)
ROLES = {"developer": "system", "function": "tool"}
KINDS = {"image_url": "image", "input_image": "image", "video_url": "video"}
TEXTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Usual:
    """Options where a request says nothing, and bounds that no request may exceed.

    options  of GenerationOptions; their max_new_tokens are the most there is room for
    media    images and videos of a request
    """

    options: Mapping[str, Any]
    media: int


@dataclass(frozen=True)
class Wanted:
    """Request to an engine: ``prompt`` is text as it stands, or messages; ``tools`` what the
    answers may call."""

    prompt: str | list[dict[str, Any]]
    options: GenerationOptions
    timeout: float | None = None
    tools: AskedTools | None = None


async def of_chat(body: ChatFields, read: Read, usual: Usual, skill: ToolSkill) -> Wanted:
    """Read the body of POST /v1/chat/completions.

    Raises Refusal, and what ``read`` raises.
    """
    given = _options(body, body.max_completion_tokens, "max_completion_tokens", usual)
    if body.logprobs:
        given["logprobs"] = _top(body.top_logprobs, "top_logprobs")
    elif body.top_logprobs:
        raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if (wanted := body.response_format) is not None:
        schema = None if wanted.json_schema is None else wanted.json_schema.schema_
        _shape(given, wanted.type, schema, "response_format")
    tools = add_tools(given, body.tools, body.tool_choice, body.parallel_tool_calls, skill)
    options = _made(given)
    messages = await _messages(body.messages, read, usual)
    return Wanted(messages, options, body.timeout, tools)


def of_completion(body: CompletionFields, usual: Usual) -> list[Wanted]:
    """Read the body of POST /v1/completions: a prompt each."""
    for name in ("echo", "suffix"):
        if getattr(body, name):
            raise Refusal(400, f"{name} is not supported; leave it out", param=name)
    if body.best_of not in (None, body.n or 1):
        raise Refusal(400, "best_of is not supported; ask for n answers", param="best_of")
    given = _options(body, None, "", usual) | {"chat_template": False}
    if body.logprobs is not None:
        given["logprobs"] = _top(body.logprobs, "logprobs")
    options = _made(given)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not prompts:
        raise Refusal(400, "prompt is empty; give a text, or several", param="prompt")
    for prompt in prompts:
        _check_length([prompt], usual)
    return [Wanted(prompt, options, body.timeout) for prompt in prompts]


async def of_response(body: ResponseFields, read: Read, usual: Usual, skill: ToolSkill) -> Wanted:
    """Read the body of POST /v1/responses."""
    if body.previous_response_id is not None:
        raise Refusal(
            400,
            "previous_response_id: nothing is stored here; send the whole conversation as input",
            param="previous_response_id",
        )
    if body.background:
        raise Refusal(400, "background is not supported; leave it out", param="background")
    given = _options(body, body.max_output_tokens, "max_output_tokens", usual)
    if body.text is not None and body.text.format is not None:
        form = body.text.format
        _shape(given, form.type, form.schema_, "text.format")
    said = body.input
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else called_before(said)
    if body.instructions is not None:
        messages = [{"role": "system", "content": body.instructions}, *messages]
    asked = of_responses(body.tools, body.tool_choice)
    tools = add_tools(given, *asked, body.parallel_tool_calls, skill)
    options = _made(given)
    return Wanted(await _messages(messages, read, usual), options, body.timeout, tools)


def _options(body: Sampled, max_tokens: int | None, name: str, usual: Usual) -> dict[str, Any]:
    given = dict(usual.options) | {
        OPTION_NAMES.get(field, field): value
        for field in SAME
        if (value := getattr(body, field)) is not None
    }
    tokens = body.max_tokens if max_tokens is None else max_tokens
    if tokens is not None and tokens < 1:
        field = "max_tokens" if max_tokens is None else name
        raise Refusal(400, f"{field} is {tokens}; give 1 or more", param=field)
    room = usual.options["max_new_tokens"]
    given["max_new_tokens"] = min(tokens or room, room)
    if isinstance(body.stop, list) and len(body.stop) > MAX_STOPS:  # looked for at every token
        raise Refusal(400, f"stop has more than {MAX_STOPS} texts; give fewer", param="stop")
    if body.logit_bias:
        given["logit_bias"] = _biases(body.logit_bias)
    if body.structured_outputs is not None:
        given |= _structured(body.structured_outputs)
    return given


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise Refusal(
            400, 'logit_bias: its keys are token ids, as in {"17": -100}', param="logit_bias"
        ) from None


def _structured(given: Structured) -> dict[str, Any]:
    named: dict[str, Any] = {"schema": given.json_, "regex": given.regex, "grammar": given.grammar}
    found = {name: value for name, value in named.items() if value is not None}
    if given.choice is not None:
        found["choice"] = given.choice
    return found


def _shape(given: dict[str, Any], kind: str, schema: dict[str, Any] | None, where: str) -> None:
    if kind == "json_object":
        given["schema"] = {"type": "object"}
    elif kind == "json_schema":
        if schema is None:
            raise Refusal(400, f"{where} is of type json_schema, but has no schema", param=where)
        given["schema"] = schema


def _top(count: int | None, name: str) -> int:
    if not 0 <= (count or 0) <= MAX_LOGPROBS:
        raise Refusal(400, f"{name} is {count}; give 0 to {MAX_LOGPROBS}", param=name)
    return count or 0


def _made(given: Mapping[str, Any]) -> GenerationOptions:
    """Options, with a mistake told by the field's name."""
    try:
        return GenerationOptions(**given)
    except ParameterError as error:
        message = str(error)
        for field, option in OPTION_NAMES.items():
            message = message.replace(f"{option} is", f"{field} is", 1)
        raise ParameterError(message) from None


async def _messages(
    given: Sequence[Mapping[str, Any]], read: Read, usual: Usual
) -> list[dict[str, Any]]:
    """Messages as prompts take them; what is wrong with one of another form is told there."""
    if not given:
        raise Refusal(400, "messages is empty; give a message of role user", param="messages")
    parts = [x for one in given if isinstance(one.get("content"), list) for x in one["content"]]
    media = sum(isinstance(x, Mapping) and x.get("type") in KINDS for x in parts)
    if media > usual.media:  # before any is read
        raise Refusal(
            400,
            f"the messages have {media} images and videos, and there is room for {usual.media}; "
            "send fewer",
            param="messages",
            code="context_length_exceeded",
        )
    if len(parts) > MAX_ITEMS:
        raise Refusal(
            400, f"the messages have more than {MAX_ITEMS:,} parts; send fewer", param="messages"
        )
    texts = [x.get("text") for x in parts if isinstance(x, Mapping)]
    called = all_texts([one.get("tool_calls") for one in given])
    _check_length([*texts, *called, *(one.get("content") for one in given)], usual)
    return [await _message(one, f"message {n}", read) for n, one in enumerate(given, 1)]


def _check_length(texts: Iterable[object], usual: Usual) -> None:
    """Raises CapacityError where texts are too long, whatever their tokens are: to make tokens of
    megabytes takes gigabytes, and a time in which nothing else runs."""
    size = sum(len(text) for text in texts if isinstance(text, str))
    room = usual.options["max_new_tokens"]
    if size > room * LONGEST_TOKEN:
        raise CapacityError(
            f"the prompt has {size:,} characters, but there is room for {room:,} tokens of prompt "
            "and answer; shorten it"
        )


async def _message(given: Mapping[str, Any], where: str, read: Read) -> dict[str, Any]:
    role = given.get("role")
    made: dict[str, Any] = {"role": ROLES.get(role, role) if isinstance(role, str) else role}
    content = given.get("content")
    if isinstance(content, list):
        parts = [await _part(part, f"{where}, part {n}", read) for n, part in enumerate(content, 1)]
        made["content"] = parts
    else:
        made["content"] = content
    own = OWN_KEYS.get(made["role"], ()) if isinstance(role, str) else ()
    made |= {key: given[key] for key in own if given.get(key) is not None}
    return made


async def _part(given: Any, where: str, read: Read) -> Any:
    if not isinstance(given, Mapping):
        return given
    kind = given.get("type")
    if kind in TEXTS:
        return {"type": "text", "text": given.get("text")}
    if kind not in KINDS:
        raise Refusal(
            400, f"{where} is of type {kind!r}; give text, image_url or video_url", param="messages"
        )
    found = given.get("image_url" if kind == "input_image" else kind)
    url = found.get("url") if isinstance(found, Mapping) else found
    if not isinstance(url, str):
        raise Refusal(400, f'{where} has no URL; give {{"url": "data:…"}}', param="messages")
    return {"type": KINDS[kind], KINDS[kind]: await read(url)}
