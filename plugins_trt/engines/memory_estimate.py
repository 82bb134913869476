"""Memory that the engines of a plan take when they run, from the manifest alone: before anything is
built, and for a device that is elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lvlm.core.errors import BuildError
from lvlm.core.progress import size
from lvlm.plugins_trt.engines.shape_profiles import Profile
from lvlm.runtime.bundle.engine_sets import EngineWeight
from lvlm.runtime.bundle.entry_form import ITEM_BYTES
from lvlm.runtime.bundle.manifest import Capacity, Manifest
from lvlm.runtime.engine.memory_plan import slot_capacity
from lvlm.runtime.kv.cache import cache_bytes
from lvlm.runtime.kv.static_capacity import static_capacity

WIDEST_ROWS = (
    12  # rows of the widest MatMul that a graph has alive at once (docs/notes/tensorrt.md)
)
INT4_BITS = 4.25  # of a number with its share of a scale, and of what is left over
ROUND = 16  # text tokens, in what is proposed


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. ``inside``: weights that each engine holds for itself, by graph; ``shared``: those
    that are inputs; ``prompt``: the cache of one of ``prompts`` at once; ``workspace``: about what
    the engines compute in, at most."""

    inside: dict[str, int]
    shared: int
    prompt: int
    prompts: int
    workspace: int
    int4: int | None = None  # of weights, about, if they were quantized; None: they are

    @property
    def weights(self) -> int:
        return self.shared + sum(self.inside.values())

    @property
    def cache(self) -> int:
        return self.prompt * self.prompts

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def estimate(
    manifest: Manifest,
    profiles: Mapping[str, Profile],
    stored: Mapping[str, Mapping[str, EngineWeight]],
    shared: Mapping[str, EngineWeight],
    inside: dict[str, int],
    workspace: int | None,
) -> MemoryEstimate:
    """Memory that these engines take; ``inside``: bytes of weights that each holds for itself;
    ``workspace``: the limit that was given for it, if one was."""
    batch = profiles["decode"]["batch"].max
    rows = batch * profiles["prefill"]["sequence"].max
    widths = [
        dim
        for name in manifest.graphs["prefill"].weights
        for dim in manifest.weights[name].dims
        if dim != manifest.text.vocab
    ]
    int4 = _as_int4(manifest, stored, shared)
    needed = rows * WIDEST_ROWS * max(widths) * ITEM_BYTES[manifest.dtype]
    return MemoryEstimate(
        inside,
        sum(weight.bytes for weight in shared.values()),
        cache_bytes(manifest, 1, static_capacity(manifest).per_layer),
        batch,
        needed if workspace is None else min(needed, workspace),
        None if int4 is None else int4 + sum(inside.values()),
    )


def _as_int4(
    manifest: Manifest,
    stored: Mapping[str, Mapping[str, EngineWeight]],
    shared: Mapping[str, EngineWeight],
) -> int | None:
    """Bytes of ``shared`` if the linear layers among them were int4 in blocks of 128, a copy for
    every engine; a head that is the embedding's weight is quantized beside it."""
    if manifest.quantization is not None or manifest.dtype == "bfloat16":
        return None
    linear = {n: w for n, w in shared.items() if manifest.text.vocab not in w.dims}
    bits = 8 * ITEM_BYTES[manifest.dtype]
    copies = sum(w.bytes for weights in stored.values() for n, w in weights.items() if n in linear)
    wide = shared.keys() - linear.keys()
    if len(wide) == 1:
        copies += sum(
            w.bytes for weights in stored.values() for n, w in weights.items() if n in wide
        )
    kept = sum(w.bytes for w in shared.values()) - sum(w.bytes for w in linear.values())
    return kept + int(copies * INT4_BITS / bits)


def check_memory(
    manifest: Manifest, needs: MemoryEstimate, memory: int, device: str, *, int4: bool = False
) -> None:
    """Raises BuildError where a device of ``memory`` bytes has no room for the weights and the
    cache: how much is missing, and what would fit; ``int4``: the target takes such weights."""
    if (missing := needs.weights + needs.cache - memory) <= 0:
        return
    what = (
        f"{device} has {size(memory)} of memory, {size(missing)} too little for weights "
        f"({size(needs.weights)}) and the cache ({size(needs.cache)} for {needs.prompts} at once)"
    )
    if memory < needs.weights and int4 and needs.int4 and needs.int4 + needs.prompt <= memory:
        mend = f"--weights int4 --block-size 128, whose weights take about {size(needs.int4)}"
        raise BuildError(f"{what}; export with {mend}")
    raise BuildError(f"{what}; {_mend(manifest, needs, memory - needs.weights)}")


def _mend(manifest: Manifest, needs: MemoryEstimate, room: int) -> str:
    """Advice on what fits into ``room`` bytes for the cache."""
    if room >= needs.prompt:
        return f"give --batch 1..{room // needs.prompt}"
    if room > 0:
        for flag, found in (
            ("--max-text-len", _text_that_fits(manifest, room)),
            ("--set kv_keep=", _share_that_fits(manifest, room)),
        ):
            if found is not None:
                value = flag + found if flag.endswith("=") else f"{flag} {found}"
                return f"export again with {value} and build with --batch 1..1"
        return "export again with a smaller --max-text-len and build with --batch 1..1"
    if manifest.dtype == "float32":
        return f"export with --dtype fp16, whose weights take {size(needs.weights // 2)}"
    return "take a smaller model, or a device with more"


def _text_that_fits(manifest: Manifest, room: int) -> str | None:
    def fits(steps: int) -> bool:
        return _fits(manifest, slot_capacity(manifest, steps * ROUND, None, None, None), room)

    largest = _largest(manifest.capacity.max_text_len // ROUND, fits)
    return str(largest * ROUND) if largest else None


def _share_that_fits(manifest: Manifest, room: int) -> str | None:
    def fits(share: int) -> bool:
        return _fits(manifest, slot_capacity(manifest, None, None, None, share / 100), room)

    largest = _largest(99, fits) if "kv_keep" in manifest.parameters else 0
    return f"{largest / 100:.2f}" if largest else None


def _fits(manifest: Manifest, capacity: Capacity, room: int) -> bool:
    given = static_capacity(replace(manifest, capacity=capacity))
    return cache_bytes(manifest, 1, given.per_layer) <= room


def _largest(upper: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``upper`` that fits, of those where every smaller one does; 0."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
