"""One prompt through one form of a bundle's graphs, following given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from lvlm.core.errors import LvlmError, ValidationError
from lvlm.export.ops.parts.int8_entries import dequantized
from lvlm.export.verify.extended import at_once, in_pieces
from lvlm.export.verify.graph_forms import GraphForm, Opened, open_form
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.engine.batch import Batch
from lvlm.runtime.engine.calls import Calls
from lvlm.runtime.generate.loaded_graphs import Graphs
from lvlm.runtime.prompt.prompts import Prompt
from lvlm.runtime.prompt.shortened import placed


@dataclass
class Run:
    """Outputs of a form: ``features`` [V,width], the cache's entries after prefill of every layer,
    ``logits`` [vocabulary] of every step and the token that the bundle's sampler takes from them;
    ``extended`` [vocabulary] those of the first one, where the prompt was read in pieces, or of the
    last one, where all before it were read at once (recipes that merge or compress);
    ``compacted``: compact.onnx has been run."""

    features: np.ndarray
    caches: list[np.ndarray] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    extended: list[np.ndarray] = field(default_factory=list)
    compacted: bool = False


def run_form(
    folder: Path,
    form: GraphForm,
    manifest: Manifest,
    prompt: Prompt,
    tokens: Sequence[int],
    opened: Opened,
    ratio: float | None = None,
    *,
    pieces: bool = False,
) -> Run:
    """``tokens`` are fed whatever is chosen. ``opened``: sessions of the same folder, those of this
    run are added. ``ratio``: of tokens and entries, None as exported. ``pieces``: the prompt is
    read in pieces, or the tokens at once, too, where there is a graph for that.

    Raises ValidationError where the form cannot be run.
    """
    shortening, compressed = bool(manifest.shortenings), manifest.cache_policy is not None
    try:
        backend, manifest = open_form(form, manifest, opened)
        graphs = Graphs(folder, manifest, backend)
        chosen = graphs.tokens(prompt.images)
        features = [tokens.features for tokens in chosen]
        prompt = placed(prompt, range(1, len(chosen) + 1), [tokens.indices for tokens in chosen])
        batch = Calls(graphs, lambda *_: chosen).start(
            [prompt], ratio if shortening else None, ratio if compressed else None
        )
        found = _follow(batch, features, manifest, tokens)
        if pieces and "extend" in manifest.graphs and manifest.in_place:
            found.extended = in_pieces(graphs, prompt, features)
        elif pieces and "extend" in manifest.graphs and len(tokens) > 1:
            found.extended = [at_once(graphs, prompt, features, tokens[:-1])]
        return found
    except LvlmError as error:
        raise ValidationError(f"the bundle's graphs ({form.name}) cannot be run: {error}") from None


def _follow(
    batch: Batch, features: list[np.ndarray], manifest: Manifest, tokens: Sequence[int]
) -> Run:
    """A prefilled batch of one, fed with ``tokens``."""
    (request,) = batch.running
    row, width = request.row, manifest.feature_width
    found = Run(_floats(np.concatenate(features)) if features else np.zeros((0, width), np.float32))
    kept = request.counts.kept[:, 0]
    for layer in range(manifest.text.layers):
        for name in ("key", "value"):
            entries = batch.cache.buffers[f"{name}_{layer}"][:, :, : kept[layer]]
            found.caches.append(_floats(entries).copy())
    for step, token in enumerate(tokens):
        logits = batch.logits[0]
        found.logits.append(logits.copy())
        found.chosen.append(row.choose(logits, ()))
        row.tokens[-1], row.finish_reason = token, None
        if step + 1 < len(tokens):
            batch.decode_step()
    c = manifest.cache_policy
    found.compacted = c is not None and c.interval is not None and len(tokens) > c.interval
    return found


def whole(manifest: Manifest, entries: int) -> Manifest:
    """A manifest by which nothing is merged or dropped at ratio 1, with room for ``entries``."""
    c = manifest.cache_policy
    return _roomy(
        replace(
            manifest,
            keep=1.0,
            encoder=None,
            reductions=tuple(
                r if r.ratio is None else replace(r, ratio=1.0) for r in manifest.reductions
            ),
            cache_policy=None if c is None else c.whole(),
        ),
        entries,
    )


def _roomy(manifest: Manifest, entries: int) -> Manifest:
    capacity = manifest.capacity
    return replace(
        manifest,
        capacity=replace(
            capacity,
            max_text_len=max(capacity.max_text_len, entries),
            per_layer=tuple(max(c, entries) for c in capacity.per_layer),
        ),
    )


def _floats(array: np.ndarray) -> np.ndarray:
    """numpy has no bf16, whose bits travel as uint16; entries in 8 bits are spread."""
    if array.dtype == np.int8:
        return dequantized(torch.from_numpy(array)).numpy()
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array
