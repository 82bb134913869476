"""What tests export bundles with; without torch, so that tests of the runtime start at once."""

from __future__ import annotations

from pathlib import Path

from lvlm.core.discovery import discover
from lvlm.export.stand_ins import stand_ins

# digits-llava: a LLaVA of 3.7 million parameters that reads grids of digits, as those in samples/,
# from 144 image tokens; the shipped tiny-llava has four times as many.
ASSETS = Path(__file__).parent / "assets"
SHIPPED = Path(__file__).parents[1] / "assets/tiny-llava"
SMALL = "llava:qwen2-tied-siglip"  # of few layers: what is slow with many nodes


def _cached() -> dict[str, tuple[str, ...]]:
    """Every recipe with a cache policy, with room for the whole cache, so that one bundle serves
    every fraction; counts are small enough for prompts of a few hundred tokens."""
    with stand_ins():
        return {
            f"{name} (cached)": (name, "kv_keep=1.0", *kind.small)
            for name, kind in discover("lvlm.export.recipes", "RECIPE").items()
            if kind().cache_policy() is not None
        }


# Merging, and then half of the cache: its default keeps all of it
LIGHTVLM = ("lightvlm", "kv_keep=0.5")
CACHED = _cached() | {"lightvlm with prefixkv": ("lightvlm", "kv=prefixkv", "kv_keep=1.0")}
# A vision graph that gives scores, and merging at one stage
AT_ENCODER = {"hybrid": ("hybrid", "encoder=visionzip")}


def for_model(model: str, settings: tuple[str, ...]) -> tuple[str, ...]:
    """``settings`` of AT_ENCODER as they can be for a model whose tower gives no scores."""
    gives = model.startswith(("llava", "tiny-llava", "digits-llava"))
    return settings if gives else tuple(x for x in settings if x != "encoder=visionzip")
