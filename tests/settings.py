"""What tests export bundles with; without torch, so that tests of the runtime start at once."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
# Cache recipes as tests export them: room for the whole cache, so that one bundle serves every
# fraction; LightVLM's counts are small enough for prompts of a few hundred tokens.
CACHED: dict[str, tuple[str, ...]] = {
    "uniform (cached)": ("uniform", "kv_keep=1.0"),
    "elastic-cache (cached)": ("elastic-cache", "kv_keep=1.0"),
    "prefixkv (cached)": ("prefixkv", "kv_keep=1.0"),
    "lightvlm (cached)": (
        *("lightvlm", "kv_keep=1.0", "kv_floor=8", "kv_protect=8", "kv_interval=16"),
    ),
    "lightvlm with prefixkv": ("lightvlm", "kv=prefixkv", "kv_keep=1.0"),
}
