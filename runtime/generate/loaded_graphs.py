"""A bundle's graphs on one backend, and how each is fed. No state but the loaded sessions, and the
last frame of a video."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvlm.core.errors import BackendError
from lvlm.core.forks import keep_in_children
from lvlm.runtime.backends import Backend, Buffer, Call, GraphSession, host_dtype
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.generate.call_plan import PromptCounts
from lvlm.runtime.generate.frames_before import FramesBefore
from lvlm.runtime.kv.slot_counts import SlotCounts
from lvlm.runtime.kv.tokens_at_once import at_once
from lvlm.runtime.media.prepared_image import ImageTokens, PreparedImage
from lvlm.runtime.prompt.prompts import Prompt

UNITS_AT_ONCE = 4  # bounds the vision graph's workspace
TOKENS_AT_ONCE = 512  # bounds the extend graph's


class Graphs:
    """The sessions of a bundle by name. For one thread at a time, as the backend is.

    ``on_demand``: graphs that are not loaded before they are bound.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, backend: Backend, on_demand: Collection[str] = ()
    ) -> None:
        self.folder, self.manifest, self.backend = folder, manifest, backend
        self.sessions: dict[str, GraphSession] = {
            name: backend.load(folder, manifest, name)
            for name in manifest.graphs
            if name not in on_demand
        }
        self._frames = FramesBefore()
        keep_in_children(self)

    @property
    def extends(self) -> bool:
        """True where there is a graph that reads several tokens behind what lies in the cache."""
        return "extend" in self.manifest.graphs

    @property
    def chooses(self) -> bool:
        """True where decode gives BEST, so that greedy rows need no logits."""
        return bool(getattr(self.sessions.get("decode"), "gives_best", False))

    def gated(self, name: str) -> bool:
        """True where a graph can be held at a gate, once a layer at least."""
        return getattr(self.sessions[name], "gated", 0) >= self.manifest.text.layers

    def bind(self, name: str, buffers: Mapping[str, Buffer]) -> Call:
        """A graph with those of the cache's ``buffers`` that it takes and gives."""
        graph = self.manifest.graphs[name]
        if name not in self.sessions:
            self.sessions[name] = self.backend.load(self.folder, self.manifest, name)
        takes, gives = {p.name for p in graph.inputs}, {p.name for p in graph.outputs}
        return self.sessions[name].bind(
            {f"past_{n}": b for n, b in buffers.items() if f"past_{n}" in takes},
            {f"present_{n}": b for n, b in buffers.items() if f"present_{n}" in gives},
        )

    def encode(self, images: Sequence[PreparedImage]) -> list[np.ndarray]:
        """The features [V,D] of each image."""
        return [features for features, _ in self._encoded(images)]

    def tokens(self, images: Sequence[PreparedImage]) -> list[ImageTokens]:
        """Image tokens of each image that go on to the language model."""
        found = self._encoded(images)
        before = self._frames.of(images, [features for features, _ in found], self.encode)
        return [
            image.chosen(*own, frame)
            for image, own, frame in zip(images, found, before, strict=True)
        ]

    def _encoded(
        self, images: Sequence[PreparedImage]
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Features [V,D] of each image, and the scores [V,S] that the tower gives besides."""
        outputs, start = self._outputs(), 0
        if self.manifest.images.independent_units:
            shared, rows = self.manifest.images.shared_rows, self._tiles(images)
        found = []
        for image in images:
            if not self.manifest.images.independent_units:
                own = self._vision(image.arrays, image.rows)
            else:
                some = slice(shared + start, shared + start + image.rows)
                own = [np.concatenate([r[:shared], r[some]]) if shared else r[some] for r in rows]
                start += image.rows
            features, *scores = map(image.features, own)
            found.append((features, scores[0] if len(outputs) > 1 else None))
        return found

    def _outputs(self) -> dict[str, tuple[int, Any]]:
        """Width and type of what the vision graph gives, the features first."""
        manifest = self.manifest
        found = {"image_features": (manifest.feature_width, host_dtype(manifest.dtype))}
        if manifest.encoder is not None and manifest.encoder.scores:
            found["image_scores"] = (manifest.encoder.scores, "float32")
        return found

    def _tiles(self, images: Sequence[PreparedImage]) -> list[np.ndarray]:
        """Rows of all images' units, a few units at a time; the shared rows first."""
        shared = self.manifest.images.shared_rows
        units = sum(p.units for p in images)
        each = sum(p.rows for p in images) // max(1, units)
        names = images[0].arrays if images else ()
        arrays = {name: np.concatenate([p.arrays[name] for p in images]) for name in names}
        parts: list[list[np.ndarray]] = []
        for first in range(0, units, UNITS_AT_ONCE):
            some = slice(first, min(first + UNITS_AT_ONCE, units))
            taken = {name: array[some] for name, array in arrays.items()}
            rows = self._vision(taken, each * (some.stop - some.start))
            parts.append([r[shared if parts else 0 :] for r in rows])
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def _vision(self, arrays: Mapping[str, np.ndarray], rows: int) -> list[np.ndarray]:
        count = self.manifest.images.shared_rows + rows
        outputs = {
            n: np.zeros((count, width), dtype) for n, (width, dtype) in self._outputs().items()
        }
        self.sessions["vision"].bind({}, {})(arrays, outputs)
        return list(outputs.values())

    def prefill(
        self,
        prompts: Sequence[Prompt],
        counts: PromptCounts,
        features: Sequence[np.ndarray],
        call: Call,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits [B,vocabulary] after each prompt, and the maps old -> new [B,N] of each reduction.

        ``features`` [V,D] are those of all rows' images in order; ``call`` is prefill, bound to
        the buffers that it fills."""
        cache_policy = counts.budgets.cache_policy
        # A count of entries as position belongs to the prompt's own, as the released code has them
        counted = cache_policy is not None and cache_policy.positions == "layer0"
        inputs = _prompt_inputs(prompts, [p.positions if counted else p.aligned for p in prompts])
        asked = {port.name for port in self.manifest.graphs["prefill"].inputs}
        nothing = np.zeros((1, self.manifest.feature_width), host_dtype(self.manifest.dtype))
        inputs |= {"image_features": np.concatenate(features) if len(features) else nothing}
        inputs |= {k: v for k, v in counts.prefill.inputs.items() if k in asked}
        outputs: dict[str, np.ndarray] = {}
        if cache_policy is not None:
            inputs["kv_budget"] = counts.kept
            for layer, budget in enumerate(counts.kept.max(1)):
                inputs[f"kv_slots_{layer}"] = np.arange(budget, dtype=np.int64)
            outputs["kept"] = np.empty_like(counts.kept)
        maps = [np.empty((len(prompts), n), np.int64) for n in counts.prefill.maps]
        outputs |= {f"merge_map_{i}": m for i, m in enumerate(maps)}
        logits = np.empty((len(prompts), self.manifest.text.vocab), np.float32)
        call(inputs, {"logits": logits, **outputs})
        if "kept" in outputs:
            check_kept(outputs["kept"], counts.kept)
        return logits, maps

    def extend(self, prompt: Prompt, span: range, features: np.ndarray, call: Call) -> np.ndarray:
        """Logits [1,vocabulary] after the tokens ``span`` of a prompt, a piece of it (pieces.py);
        the entries of those before them lie in the cache.

        ``features`` [V,D] are those of the prompt's last V image tokens, the span's and all that
        follow among them; ``call`` is extend, bound to the one row of the prompt's entries."""
        places = {
            "write_index": np.array([span.start], np.int64),
            # Where there is no past, one slot that nothing sees: engines take no empty tensors
            "past_slots": np.arange(max(1, span.start), dtype=np.int64),
        }
        if self.manifest.images.bidirectional:
            places["image_id"] = prompt.image_id[None, span.start : span.stop]
        return self._extend(prompt, span, features, places, call)

    def extend_kept(
        self, prompt: Prompt, span: range, features: np.ndarray, counts: SlotCounts, call: Call
    ) -> np.ndarray:
        """The same with a recipe that merges or compresses: as if decode had read the tokens behind
        what lies in the cache, one after the other. ``counts``, of the one row, count them."""
        tokens = at_once(counts, len(span))
        own = dict(tokens.inputs)
        if tokens.positions is not None:
            shape = prompt.aligned[..., None, span.start : span.stop].shape
            own["position_ids"] = np.broadcast_to(tokens.positions, shape)
        return self._extend(prompt, span, features, own, call)

    def _extend(
        self,
        prompt: Prompt,
        span: range,
        features: np.ndarray,
        own: Mapping[str, np.ndarray],
        call: Call,
    ) -> np.ndarray:
        inputs = {**_piece_inputs(prompt, span, features), **own}
        if not len(inputs["image_features"]):
            nothing = np.zeros((1, self.manifest.feature_width), host_dtype(self.manifest.dtype))
            inputs["image_features"] = nothing
        logits = np.empty((1, self.manifest.text.vocab), np.float32)
        call(inputs, {"logits": logits})
        return logits


def _piece_inputs(prompt: Prompt, span: range, features: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of extend for some tokens of a prompt, without where they go and the buffers."""
    some = slice(span.start, span.stop)
    image = prompt.image_id > 0
    number = image.cumsum() - 1 - (image.sum() - len(features))  # of an image token in ``features``
    rows = number[some][image[some]]
    first = int(rows[0]) if len(rows) else 0
    return {
        "input_ids": np.array(prompt.ids[some], np.int64)[None],
        "image_features": features[first : first + len(rows)],
        "image_row": np.where(image[some], number[some] - first, -1)[None],
        "position_ids": prompt.aligned[..., None, some],
        "last_token": np.array([len(span) - 1], np.int64),
    }


def _prompt_inputs(
    prompts: Sequence[Prompt], positions: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Rows of different lengths as arrays [B,N], padded on the right."""
    rows, longest = len(prompts), max(len(p.ids) for p in prompts)
    ids = np.zeros((rows, longest), np.int64)
    image_id = np.full((rows, longest), -1, np.int64)
    image_row = np.full((rows, longest), -1, np.int64)
    position = np.zeros((*positions[0].shape[:-1], rows, longest), np.int64)
    next_feature = 0
    for b, prompt in enumerate(prompts):
        length = len(prompt.ids)
        ids[b, :length] = prompt.ids
        image_id[b, :length] = prompt.image_id
        position[..., b, :length] = positions[b]
        placeholders = np.flatnonzero(prompt.image_id > 0)
        count = len(placeholders)
        image_row[b, placeholders] = np.arange(next_feature, next_feature + count)
        next_feature += count
    return {
        "input_ids": ids,
        "image_row": image_row,
        "image_id": image_id,
        "position_ids": position,
    }


def check_kept(kept: np.ndarray, expected: np.ndarray) -> None:
    """The graph's counts [L,B] are the host's, or an importance was not finite."""
    wrong = np.argwhere(kept != expected)
    if len(wrong):
        layer, row = wrong[0]
        raise BackendError(
            f"layer {layer}, prompt {row + 1}: the attention that ranks the cache entries is not "
            "finite, so none was dropped; the weights or the image overflow this dtype (try "
            "--dtype fp32)"
        )
