"""Bodies of requests: the fields of OpenAI's API that a bundle has a use for, and those of vLLM and
of this project beside them. Fields that are not listed are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

MAX_ITEMS = 10_000  # of a list or an object: pydantic checks each one on the event loop


def _json_number(value: object) -> object:
    """pydantic takes "1" and true for numbers; JSON's own numbers are meant."""
    if isinstance(value, str | bool):
        raise ValueError("give a number")
    return value


Whole = Annotated[int, BeforeValidator(_json_number)]
Number = Annotated[float, BeforeValidator(_json_number)]


class Fields(BaseModel):
    """An object of which only known fields are read."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _few(cls, value: object) -> object:
        """Before pydantic looks at the items, and makes an error of kilobytes for each."""
        if isinstance(value, list | dict) and len(value) > MAX_ITEMS:
            raise ValueError(f"it has {len(value):,} items; give {MAX_ITEMS:,} at most")
        return value


class StreamOptions(Fields):
    """Facts that a stream tells besides text."""

    include_usage: bool = False


class JsonSchema(Fields):
    """A named JSON schema."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """Form that an answer has to have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class Structured(Fields):
    """vLLM's ``structured_outputs``: at most one of them."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Sampled(Fields):
    """Choice of the tokens of an answer, and how many; what is left out is as the server was
    started, temperature 0 unless it says otherwise."""

    model: str | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Whole | None = None
    min_p: Number | None = None
    seed: Whole | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Whole] | None = None
    ignore_eos: bool | None = None
    n: Whole | None = None
    max_tokens: Whole | None = None
    min_tokens: Whole | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    keep: Number | list[Number] | None = None
    kv_keep: Number | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: Structured | None = None
    timeout: Number | None = None
    lvlm_details: bool = False
    user: str | None = None


class ChatFields(Sampled):
    """The body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None


class CompletionFields(Sampled):
    """The body of POST /v1/completions."""

    prompt: str | list[str]
    logprobs: Whole | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Whole | None = None


class TextFormat(Fields):
    """``text.format`` of /v1/responses."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseText(Fields):
    """``text`` of /v1/responses."""

    format: TextFormat | None = None


class ResponseFields(Sampled):
    """The body of POST /v1/responses, as far as it maps."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Whole | None = None
    text: ResponseText | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None
