"""One batch of prompts on its way: vision, prefill, then decode steps over a compact cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lvlm.runtime.backends import Call, Session, host_dtype
from lvlm.runtime.budgets import Budgets
from lvlm.runtime.errors import BackendError
from lvlm.runtime.limits import new_token_limit
from lvlm.runtime.sampling import Sampler
from lvlm.runtime.schedule import Keep, keep_ratios, plan_prefill

if TYPE_CHECKING:
    from lvlm.runtime.engine import Engine, Prompt

PICTURES_AT_ONCE = 4  # bounds the vision graph's workspace


@dataclass
class Timings:
    """Milliseconds; prefill without vision."""

    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    decode_steps: int = 0


@dataclass
class RowState:
    """What became of one prompt so far. finish_reason: stop, length, or None while it runs.

    ``limit`` is the number of new tokens it may have, ``wanted`` what was asked for.
    """

    sampler: Sampler
    limit: int
    wanted: int
    position: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Batch:
    """Prompts on their way: ``step`` decodes one token for every row that still runs.

    ``features`` are the pictures' [P,V,D] (bf16 as its bits), ``merge_maps`` old -> new [B,N] of
    each reduction.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        keep: Keep | None,
        kv_keep: float | None,
    ) -> None:
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
        self.budgets = Budgets.of(manifest.compression, manifest.text.layers, kv_keep)
        self.kept = self.budgets.prompt(self.plan.entries)
        self.rows = [
            RowState(
                Sampler(p.sampling, p.ids),
                new_token_limit(
                    manifest,
                    self.budgets,
                    self.plan.entries[:, row],
                    text_tokens[row],
                    len(self.image_tokens[row]),
                    p.max_new_tokens,
                ),
                p.max_new_tokens,
                len(p.ids),
            )
            for row, p in enumerate(prompts)
        ]
        fed = np.array([r.limit - 1 for r in self.rows])  # the last token is never fed back
        needed = self.budgets.capacity(self.plan.entries, fed)
        self.cache = engine.cache_for(len(prompts), needed, self.budgets)
        self.features = self._encode(prompts)
        self.logits = self._prefill(prompts, self.features)
        self._decode = self._bind("decode", engine.decode)
        self._compact = self._bind("compact", engine.compact) if engine.compact else None

    def _bind(self, name: str, session: Session) -> Call:
        """A graph with those of the cache's buffers that it takes and gives."""
        graph, cache = self.engine.manifest.graphs[name], self.cache
        takes, gives = {p.name for p in graph.inputs}, {p.name for p in graph.outputs}
        return session.bind(
            {name: buffer for name, buffer in cache.as_past().items() if name in takes},
            {name: buffer for name, buffer in cache.as_present().items() if name in gives},
        )

    def _encode(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """image_features [pictures,V,D] of all rows; one picture of zeros if there is none."""
        began = time.perf_counter()
        manifest = self.engine.manifest
        pixels = np.concatenate([p.pixels for p in prompts])
        shape = (max(1, len(pixels)), manifest.images.tokens, manifest.text.hidden)
        features = np.zeros(shape, host_dtype(manifest.dtype))
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
        outputs: dict[str, np.ndarray] = {}
        if self.budgets.compression is not None:
            inputs["kv_budget"] = self.kept
            for layer, most in enumerate(self.kept.max(1)):
                inputs[f"kv_slots_{layer}"] = np.arange(most, dtype=np.int64)
            outputs["kept"] = np.empty_like(self.kept)
        self.merge_maps = [np.empty((rows, n), np.int64) for n in self.plan.maps]
        outputs |= {f"merge_map_{i}": m for i, m in enumerate(self.merge_maps)}
        logits = np.empty((rows, self.engine.manifest.text.vocab), np.float32)
        call = self._bind("prefill", self.engine.prefill)
        call(inputs, {"logits": logits, **outputs})
        if "kept" in outputs:
            _check_kept(outputs["kept"], self.kept)
        self.cache.begin(self.plan.entries, self.kept)
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
        positions = self.cache.positions(np.array([row.position for row in self.rows], np.int64))
        inputs = {
            "input_ids": np.array([[row.tokens[-1]] for row in self.rows], np.int64),
            "position_ids": positions[:, None],
            "write_index": write_index,
            "valid_length": valid_length,
        }
        if self._compact is not None:
            inputs["query_index"] = self.cache.query_index
        self._decode(inputs, {"logits": self.logits})
        self.cache.advance(running)
        for row in self.rows:
            row.position += row.finish_reason is None
        self._compact_cache()
        self.timings.decode_ms += _since(began)
        self.timings.decode_steps += 1

    def _compact_cache(self) -> None:
        """Between two steps: drop entries where an interval is over and there are too many."""
        inputs = self.cache.compaction()
        if inputs is None or self._compact is None:
            return
        kept = np.empty_like(inputs["kv_budget"])
        self._compact(inputs, {"kept": kept})
        _check_kept(kept, inputs["kv_budget"])
        self.cache.compacted()


def _check_kept(kept: np.ndarray, expected: np.ndarray) -> None:
    """The graph's counts [L,B] are the host's, or an importance was not finite."""
    wrong = np.argwhere(kept != expected)
    if len(wrong):
        layer, row = wrong[0]
        raise BackendError(
            f"layer {layer}, prompt {row + 1}: the attention that ranks the cache entries is not "
            "finite, so none was dropped; the weights or the picture overflow this dtype (try "
            "--dtype fp32)"
        )


def _tail(image_id: np.ndarray) -> int:
    """Tokens after the last picture of a row; 0 without one: there is nothing to score."""
    images = np.flatnonzero(image_id > 0)
    return len(image_id) - int(images[-1]) - 1 if len(images) else 0


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3
