"""What tests make checkpoints and bundles of: models, and recipes with their settings.

Not in conftest.py: folders have files of that name, too, and ``import conftest`` may find any.
"""

from __future__ import annotations

from pathlib import Path

from lvlm.export.families._base import Family
from lvlm.runtime.discovery import discover

ASSETS = Path(__file__).parents[1] / "assets"
FAMILIES: dict[str, Family] = discover("lvlm.export.families", "FAMILY")
TINY = {
    f"{family.name}:{name}": (family, config)
    for family in FAMILIES.values()
    for name, config in family.tiny_configs()
}
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
# In a normal run: every one on the trained model, and each architecture with one of them.
CACHED_USUAL = [
    *(("tiny-llava", cached) for cached in CACHED),
    *zip(
        TINY,
        ("elastic-cache (cached)", "lightvlm (cached)", "prefixkv (cached)", "uniform (cached)"),
        strict=False,
    ),
]
