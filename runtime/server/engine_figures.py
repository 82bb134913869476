"""Figures that engines keep themselves, as metrics: vLLM's names where they mean the same."""

from __future__ import annotations

from collections.abc import Callable

from lvlm.runtime.engine.stats import EngineStats

Figure = tuple[str, Callable[[EngineStats], float]]  # what it is, and where it comes from

GAUGES: dict[str, Figure] = {
    "vllm:num_requests_running": ("Requests being answered", lambda s: s.running),
    "vllm:num_requests_waiting": ("Requests in the queue", lambda s: s.waiting),
    "vllm:kv_cache_usage_perc": (
        "Part of the KV cache in use, 1 is all",
        lambda s: s.cache_bytes_used / max(1, s.cache_bytes),
    ),
}
COUNTERS: dict[str, Figure] = {
    "vllm:prompt_tokens": ("Prompt tokens", lambda s: s.prompt_tokens),
    "vllm:generation_tokens": ("Tokens of answers", lambda s: s.new_tokens),
    "vllm:prefix_cache_hits": (
        "Prompt tokens that lay in the cache already",
        lambda s: s.reused_tokens,
    ),
    "lvlm:image_cache_hits": ("Images whose features were known", lambda s: s.image_hits),
    "lvlm:image_cache_misses": ("Images that were encoded", lambda s: s.image_misses),
}
