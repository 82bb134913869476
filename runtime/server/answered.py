"""From answers to the bodies of responses, in OpenAI's form."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from lvlm.runtime.generate.answers import Generation, Stats
from lvlm.runtime.prompt.text import Tokenizer
from lvlm.runtime.sampling.sampler import TokenScore

Kind = Literal["chat", "completion"]


def compact(data: object) -> bytes:
    """JSON in one line."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def new_id(prefix: str) -> str:
    """An id: ``chatcmpl-…``, ``resp_…``."""
    return f"{prefix}{uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())


def usage(answers: Sequence[Generation]) -> dict[str, Any]:
    """Tokens of all answers; prompts that were read for several count once."""
    stats = answers[0].stats
    new = sum(answer.stats.new_tokens for answer in answers)
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": stats.prompt_tokens + new,
        "prompt_tokens_details": {
            "cached_tokens": stats.reused_tokens,
            "image_tokens": stats.encoded_image_tokens,
            "image_tokens_kept": image_tokens_kept(stats),
        },
    }


def image_tokens_kept(stats: Stats) -> int:
    """Image tokens that the last block still had."""
    return stats.image_tokens_per_layer[-1] if stats.image_tokens_per_layer else 0


def added(usages: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The usage of several prompts together."""
    total: dict[str, Any] = {}
    for one in usages:
        for name, value in one.items():
            if isinstance(value, dict):
                total[name] = added([total.get(name, {}), value])
            else:
                total[name] = total.get(name, 0) + value
    return total


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], scores: Sequence[TokenScore]
) -> dict[str, Any]:
    """``logprobs`` of /v1/chat/completions."""
    content = []
    for token, score in zip(tokens, scores, strict=True):
        top = [_scored(tokenizer, one, value) for one, value in score.top]
        content.append(_scored(tokenizer, token, score.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], scores: Sequence[TokenScore], offset: int
) -> dict[str, Any]:
    """``logprobs`` of /v1/completions; the first token's text begins at ``offset``."""
    texts = [tokenizer.token_text(token) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [
            {tokenizer.token_text(token): value for token, value in score.top} for score in scores
        ],
        "text_offset": offsets,
    }


def _scored(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.token_text(token)
    # A token may be part of a character: whose bytes it has, no text tells
    own = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": own}


def details(answer: Generation, first_token_ms: float, full_cache_bytes: int) -> dict[str, Any]:
    """Details that ``lvlm_details`` asks for: what an answer took, and the fate of each image
    token."""
    stats = answer.stats
    return {
        "queued_ms": round(stats.queued_ms, 2),
        "vision_ms": round(stats.vision_ms, 2),
        "prefill_ms": round(stats.prefill_ms, 2),
        "first_token_ms": round(first_token_ms, 2),
        "tokens_per_second": round(stats.decode_tokens_per_second, 2),
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "new_tokens": stats.new_tokens,
        "image_tokens": stats.encoded_image_tokens,
        "tokens_per_layer": list(stats.tokens_per_layer),
        "image_tokens_per_layer": list(stats.image_tokens_per_layer),
        "kept_per_layer": list(stats.kept_per_layer),
        "cache_bytes": stats.cache_bytes_used,
        "full_cache_bytes": full_cache_bytes,
    }
