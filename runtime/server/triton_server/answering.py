"""From answers to responses of Triton: a row of every output for each answer."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lvlm.runtime.engine.handle import Handle, News
from lvlm.runtime.prompt.text import Tokenizer
from lvlm.runtime.server.answered import chat_logprobs, compact, usage
from lvlm.runtime.server.following import follow
from lvlm.runtime.server.refusals import GONE, Refusal
from lvlm.runtime.server.triton_server.python_api import PythonApi, Sender
from lvlm.runtime.server.triton_server.request_reader import Question

PADDING = -1  # of rows of token ids that are shorter than others
NOTHING = News([], "", [])


class AnswerSender:
    """The answers to one request, on their way to its sender."""

    def __init__(
        self,
        api: PythonApi,
        sender: Sender,
        tokenizer: Tokenizer,
        question: Question,
        handles: Sequence[Handle],
    ) -> None:
        self._api, self._sender, self._tokenizer = api, sender, tokenizer
        self._question, self._handles = question, handles
        tools = question.wanted.tools
        self._readers = [] if tools is None else [tools.reader() for _ in handles]

    async def send(self) -> None:
        """Send them: as they come, or all at the end. Raises what the engine raises."""
        left = len(self._handles)
        async for step in follow(self._handles):
            left -= step.ended
            if self._question.stream:
                self._send({step.index: step.news}, {step.index} if step.ended else (), not left)
        if not self._question.stream:
            every = range(len(self._handles))
            self._send({n: self._handles[n].since(0) for n in every}, every, True)

    def _send(self, told: Mapping[int, News], ended: Collection[int], last: bool) -> None:
        """Send what is new of answers, and which have ended; ``last``: nothing follows."""
        news = [told.get(n, NOTHING) for n in range(len(self._handles))]
        texts = [self._question.lead + one.text for one in news]
        ends = [
            handle.own_result().finish_reason if n in ended else ""
            for n, handle in enumerate(self._handles)
        ]
        calls: list[list[Any]] = []
        for n, reader in enumerate(self._readers):
            parts = reader.read(texts[n], n in ended)
            texts[n] = "".join(part for part in parts if isinstance(part, str))
            ends[n] = reader.ended(ends[n])
            calls.append([part for part in parts if not isinstance(part, str)])
        outputs = [
            self._texts("text_output", [text.encode() for text in texts]),
            self._texts("finish_reason", [end.encode() for end in ends]),
            self._api.Tensor("token_ids", _rows([one.tokens for one in news])),
        ]
        if self._question.wanted.options.logprobs is not None:
            outputs.append(self._texts("logprobs", [self._logprobs(one) for one in news]))
        if self._readers:
            outputs.append(self._texts("tool_calls", [compact(one) for one in calls]))
        if last:
            answers = [handle.own_result() for handle in self._handles]
            outputs.append(self._texts("usage", [compact(usage(answers))]))
        response = self._api.InferenceResponse(output_tensors=outputs)
        flags = self._api.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
        self._sender.send(response, flags=flags)

    def _texts(self, name: str, values: Sequence[bytes]) -> Any:
        return self._api.Tensor(name, np.array(values, dtype=np.object_))

    def _logprobs(self, news: News) -> bytes:
        """Log-probabilities as OpenAI's chat completions have them."""
        scored = chat_logprobs(self._tokenizer, news.tokens, news.scores)
        return json.dumps(scored["content"]).encode()


def _rows(tokens: Sequence[Sequence[int]]) -> np.ndarray:
    rows = np.full((len(tokens), max(map(len, tokens))), PADDING, np.int32)
    for row, one in zip(rows, tokens, strict=True):
        row[: len(one)] = one
    return rows


def send_error(api: PythonApi, sender: Sender, refused: Refusal) -> None:
    """Send the end of a request that has no answer."""
    errors = api.TritonError
    codes = {404: errors.NOT_FOUND, 429: errors.UNAVAILABLE, GONE: errors.CANCELLED}
    usual = errors.INVALID_ARG if refused.status < 500 else errors.UNAVAILABLE
    code = errors.INTERNAL if refused.status == 500 else codes.get(refused.status, usual)
    response = api.InferenceResponse(output_tensors=[], error=errors(refused.message, code))
    sender.send(response, flags=api.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
