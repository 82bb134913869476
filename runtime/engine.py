"""Running one batch of prompts: vision, prefill, then decode steps over a compact cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lvlm.runtime.backends import Backend, Session
from lvlm.runtime.bundle import Manifest
from lvlm.runtime.cache import CompactCache
from lvlm.runtime.errors import CapacityError
from lvlm.runtime.sampling import Sampler, Sampling
from lvlm.runtime.schedule import Keep, keep_ratios, plan_prefill

CAPACITY_STEP = 64  # cache lengths are rounded up to this, so that buffers are reused
PICTURES_AT_ONCE = 4  # bounds the vision graph's workspace


@dataclass(frozen=True)
class Prompt:
    """One row: token ids with every picture's placeholder repeated per image token.

    image_id [N] int64: 0 text, m the m-th picture; pixels float32 [pictures,3,H,W].
    """

    ids: Sequence[int]
    image_id: np.ndarray
    pixels: np.ndarray
    sampling: Sampling
    max_new_tokens: int


@dataclass
class Timings:
    """Milliseconds; prefill without vision."""

    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    decode_steps: int = 0


@dataclass
class RowState:
    """What became of one prompt so far. finish_reason: stop, length, or None while it runs."""

    sampler: Sampler
    limit: int
    position: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Engine:
    """The graphs of a bundle on one backend. Not thread-safe: one batch at a time."""

    def __init__(self, folder: Path, manifest: Manifest, backend: Backend) -> None:
        self.manifest, self.backend = manifest, backend
        graphs = manifest.graphs
        self.vision: Session = backend.load(folder, graphs["vision"])
        self.prefill: Session = backend.load(folder, graphs["prefill"])
        self.decode: Session = backend.load(folder, graphs["decode"])
        self._cache: CompactCache | None = None

    def start(self, prompts: Sequence[Prompt], keep: Keep | None = None) -> Batch:
        """Encode the pictures, prefill every prompt and sample each first token."""
        return Batch(self, prompts, keep)

    def cache_for(self, batch: int, needed: np.ndarray) -> CompactCache:
        """Buffers for ``needed`` entries per layer; the last ones again where they fit."""
        limits = np.array(self.manifest.capacity.per_layer)
        rounded = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
        capacities = np.minimum(rounded, np.maximum(limits, needed))
        old = self._cache
        if (
            old is None
            or old.lengths.shape[1] != batch
            or not np.array_equal(old.capacities, capacities)
        ):
            self._cache = None  # freed before the new one is allocated
            text = self.manifest.text
            self._cache = CompactCache(
                self.backend,
                batch,
                text.kv_heads,
                text.head_dim,
                self.manifest.dtype,
                capacities.tolist(),
            )
        assert self._cache is not None
        return self._cache


class Batch:
    """Prompts on their way: ``step`` decodes one token for every row that still runs.

    ``features`` are the pictures' [P,V,D], ``merge_maps`` old -> new [B,N] of each reduction.
    """

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], keep: Keep | None) -> None:
        self.engine = engine
        self.timings = Timings()
        manifest = engine.manifest
        images = [np.unique(p.image_id[p.image_id > 0], return_counts=True)[1] for p in prompts]
        self.image_tokens = [counts.tolist() for counts in images]
        text_tokens = [len(p.ids) - sum(v) for p, v in zip(prompts, self.image_tokens, strict=True)]
        self.ratios = keep_ratios(manifest.reductions, manifest.keep, keep)
        self.plan = plan_prefill(
            manifest.reductions,
            self.ratios,
            manifest.text.layers,
            text_tokens,
            self.image_tokens,
            [_tail(p.image_id) for p in prompts],
        )
        self.rows = [
            RowState(
                Sampler(p.sampling, p.ids),
                self._limit(row, p.max_new_tokens, text_tokens[row]),
                len(p.ids),
            )
            for row, p in enumerate(prompts)
        ]
        needed = (self.plan.entries + np.array([r.limit for r in self.rows])).max(1)
        self.cache = engine.cache_for(len(prompts), needed)
        self.features = self._encode(prompts)
        self.logits = self._prefill(prompts, self.features)
        bound = self.cache.as_past(), self.cache.as_present()
        self._decode = engine.decode.bind(*bound)

    def _limit(self, row: int, wanted: int, text_tokens: int) -> int:
        """New tokens a row may have within the bundle's capacity; an error if none."""
        capacity = self.engine.manifest.capacity
        pictures = len(self.image_tokens[row])
        if pictures > capacity.max_images:
            raise CapacityError(
                f"{pictures} images, but the bundle was exported with --max-images "
                f"{capacity.max_images}; export with more"
            )
        if text_tokens >= capacity.max_text_len:
            raise CapacityError(
                f"the prompt has {text_tokens} text tokens, but the bundle was exported with "
                f"--max-text-len {capacity.max_text_len} for prompt and answer; shorten it or "
                "export with more"
            )
        room = np.array(capacity.per_layer) - self.plan.entries[:, row]
        if room.min() < 1:
            layer = int(room.argmin())
            raise CapacityError(
                f"at this keep ratio layer {layer} needs {self.plan.entries[layer, row] + 1} cache "
                f"entries, the bundle has {capacity.per_layer[layer]}; lower keep or export with "
                "a larger one"
            )
        return min(wanted, capacity.max_text_len - text_tokens, int(room.min()))

    def _encode(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """image_features [pictures,V,D] of all rows; one picture of zeros if there is none."""
        began = time.perf_counter()
        manifest = self.engine.manifest
        pixels = np.concatenate([p.pixels for p in prompts])
        shape = (max(1, len(pixels)), manifest.images.tokens, manifest.text.hidden)
        features = np.zeros(shape, manifest.dtype)
        for first in range(0, len(pixels), PICTURES_AT_ONCE):
            some = slice(first, min(first + PICTURES_AT_ONCE, len(pixels)))
            call = self.engine.vision.bind({}, {})
            call({"pixel_values": pixels[some]}, {"image_features": features[some]})
        self.timings.vision_ms = _since(began)
        return features

    def _prefill(self, prompts: Sequence[Prompt], features: np.ndarray) -> np.ndarray:
        """Logits [B,vocabulary] after each prompt; fills the cache."""
        began = time.perf_counter()
        rows, longest = len(prompts), max(len(p.ids) for p in prompts)
        ids = np.zeros((rows, longest), np.int64)
        image_id = np.full((rows, longest), -1, np.int64)
        image_row = np.full((rows, longest), -1, np.int64)
        next_feature = 0
        for b, prompt in enumerate(prompts):
            length = len(prompt.ids)
            ids[b, :length] = prompt.ids
            image_id[b, :length] = prompt.image_id
            placeholders = np.flatnonzero(prompt.image_id > 0)
            count = len(placeholders)
            image_row[b, placeholders] = np.arange(next_feature, next_feature + count)
            next_feature += count
        inputs = {
            "input_ids": ids,
            "image_features": features,
            "image_row": image_row,
            "image_id": image_id,
            "position_ids": np.tile(np.arange(longest, dtype=np.int64), (rows, 1)),
        }
        graph = self.engine.manifest.graphs["prefill"]
        asked = {port.name for port in graph.inputs}
        inputs |= {k: v for k, v in self.plan.inputs.items() if k in asked}
        self.merge_maps = [np.empty((rows, n), np.int64) for n in self.plan.maps]
        outputs = {f"merge_map_{i}": m for i, m in enumerate(self.merge_maps)}
        logits = np.empty((rows, self.engine.manifest.text.vocab), np.float32)
        call = self.engine.prefill.bind(self.cache.as_past(), self.cache.as_present())
        call(inputs, {"logits": logits, **outputs})
        self.cache.begin(self.plan.entries)
        self.timings.prefill_ms = _since(began)
        return logits

    @property
    def active(self) -> bool:
        return any(row.finish_reason is None for row in self.rows)

    def step(self) -> Iterator[tuple[int, int]]:
        """Choose the next token of every running row and yield (row, token); then decode them."""
        eos = self.engine.manifest.text.eos_ids
        for index, row in enumerate(self.rows):
            if row.finish_reason is not None:
                continue
            token = row.sampler.choose(self.logits[index])
            row.tokens.append(token)
            if token in eos:
                row.finish_reason = "stop"
            elif len(row.tokens) >= row.limit:
                row.finish_reason = "length"
            yield index, token
        if self.active:
            self.decode_step()

    def decode_step(self) -> None:
        """Feed every row's newest token; afterwards ``logits`` [B,vocabulary] are the next ones."""
        began = time.perf_counter()
        running = np.array([row.finish_reason is None for row in self.rows])
        write_index, valid_length = self.cache.next_slot()
        inputs = {
            "input_ids": np.array([[row.tokens[-1]] for row in self.rows], np.int64),
            "position_ids": np.array([[row.position] for row in self.rows], np.int64),
            "write_index": write_index,
            "valid_length": valid_length,
        }
        self._decode(inputs, {"logits": self.logits})
        self.cache.advance(running)
        for row in self.rows:
            row.position += row.finish_reason is None
        self.timings.decode_ms += _since(began)
        self.timings.decode_steps += 1


def _tail(image_id: np.ndarray) -> int:
    """Tokens after the last picture of a row; 0 without one: there is nothing to score."""
    images = np.flatnonzero(image_id > 0)
    return len(image_id) - int(images[-1]) - 1 if len(images) else 0


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3
