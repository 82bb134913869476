"""The graph extend: a prompt read in pieces gives what prefill gives of the whole."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import USUAL
from parity_tools import ROWS

import lvlm
from lvlm.export.verify.checks import TOLERANCE, difference
from lvlm.export.verify.extended import in_pieces
from lvlm.runtime.backends import Call
from lvlm.runtime.generate.call_plan import count_prompts
from lvlm.runtime.generate.loaded_graphs import Graphs
from lvlm.runtime.generate.pieces import border_before
from lvlm.runtime.kv.cache import CompactCache
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.prompts import Prompt

MODELS = ["digits-llava", *USUAL]
WHOLE_OPTIONS = GenerationOptions(chat_template=False)


def prompts_of(model: Model) -> list[Prompt]:
    return [
        model.prepare(row, text, images, WHOLE_OPTIONS) for row, (text, images) in enumerate(ROWS)
    ]


def filled(graphs: Graphs, prompt: Prompt) -> tuple[CompactCache, np.ndarray, np.ndarray, Call]:
    """A cache, what prefill says of the prompt, its images' features, and extend over the cache."""
    counts = count_prompts(graphs.manifest, [prompt], None, None)
    cache = CompactCache(
        graphs.backend,
        graphs.manifest.text,
        graphs.manifest.cache_dtype,
        1,
        counts.prefill.entries.max(1).tolist(),
        counts.budgets,
    )
    row = cache.views(slice(0, 1))
    features = graphs.encode(prompt.images)
    logits, _ = graphs.prefill([prompt], counts, features, graphs.bind("prefill", row))
    rows = np.concatenate(features) if features else np.zeros((0, graphs.manifest.feature_width))
    return cache, logits, rows.astype(np.float32), graphs.bind("extend", row)


@pytest.mark.parametrize("name", MODELS)
def test_any_cut_gives_the_logits_and_the_cache_of_prefill(
    name: str, bundle: Callable[..., Path]
) -> None:
    with lvlm.load(bundle(name, max_images=2)) as model:
        graphs = model.calls.graphs
        if model.manifest.text.bidirectional:  # prompts stay whole
            assert not graphs.extends
            return
        for prompt in prompts_of(model):
            cache, expected, features, extend = filled(graphs, prompt)
            whole = {name: buffer.copy() for name, buffer in cache.buffers.items()}
            length = len(prompt.ids)
            for cuts in ([], [1], [length - 1], [length // 3, 2 * (length // 3)]):
                for buffer in cache.buffers.values():
                    buffer[...] = 0
                if graphs.manifest.images.bidirectional:  # images stay whole
                    cuts = [border_before(prompt.image_id, cut) for cut in cuts]
                for start, end in pairwise(sorted({0, *cuts, length})):
                    found = graphs.extend(prompt, range(start, end), features, extend)
                assert difference(found, expected) < 1e-4, cuts
                worst = max(difference(cache.buffers[n], x) for n, x in whole.items())
                assert worst < 1e-4, cuts


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("digits-llava", {"dtype": "fp16"}),
        ("digits-llava", {"weights": "int4", "cache": "fp16"}),
        ("digits-llava", {"cache": "int8"}),
        ("llava:qwen2-tied-siglip", {"weights": "int8", "block_size": 16}),
    ],
    ids=["fp16", "int4", "int8 cache", "int8"],
)
def test_low_precision(name: str, how: dict[str, Any], bundle: Callable[..., Path]) -> None:
    with lvlm.load(bundle(name, max_images=2, **how)) as model:
        graphs = model.calls.graphs
        prompt = prompts_of(model)[1]
        features = graphs.encode(prompt.images)
        _, expected, _, _ = filled(graphs, prompt)
        for found in in_pieces(graphs, prompt, features):
            assert difference(found, expected[0]) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("name", ["digits-llava", "qwen2-vl:gqa"])
def test_rows_of_different_lengths_at_once(name: str, bundle: Callable[..., Path]) -> None:
    """Each row has other entries there, and another number of new tokens; what lies behind a row's
    entries is not seen."""
    with lvlm.load(bundle(name, max_images=2)) as model:
        graphs, manifest = model.calls.graphs, model.manifest
        prompts = prompts_of(model)[:2]
        starts, lengths = [9, 30], [len(p.ids) for p in prompts]
        counts = count_prompts(manifest, prompts, None, None)
        new = [length - start for length, start in zip(lengths, starts, strict=True)]
        slots = max(start + max(new) for start in starts)
        cache = CompactCache(
            graphs.backend,
            manifest.text,
            manifest.cache_dtype,
            2,
            [slots] * manifest.text.layers,
            counts.budgets,
        )
        features = graphs.encode([image for p in prompts for image in p.images])
        call = graphs.bind("prefill", cache.views(slice(0, 2)))
        expected, _ = graphs.prefill(prompts, counts, features, call)
        for buffer in cache.buffers.values():
            for row, start in enumerate(starts):
                buffer[row, :, start:] = 1e4  # finite: no weight times it is 0
        taken = np.zeros((len(prompts), max(new)), np.int64)
        image_row = np.full_like(taken, -1)
        positions = np.zeros((*prompts[0].aligned.shape[:-1], *taken.shape), np.int64)
        before = 0
        for row, (prompt, start, count) in enumerate(zip(prompts, starts, new, strict=True)):
            taken[row, :count] = prompt.ids[start:]
            image = prompt.image_id > 0
            number = np.where(image, before + image.cumsum() - 1, -1)
            image_row[row, :count] = number[start:]
            positions[..., row, :count] = prompt.aligned[..., start:]
            before += int(image.sum())
        logits = np.empty((2, manifest.text.vocab), np.float32)
        graphs.bind("extend", cache.views(slice(0, 2)))(
            {
                "input_ids": taken,
                "image_features": np.concatenate(features),
                "image_row": image_row,
                "position_ids": positions,
                "last_token": np.array(new) - 1,
                "write_index": np.array(starts),
                "past_slots": np.arange(max(starts)),
            },
            {"logits": logits},
        )
        assert difference(logits, expected) < 1e-4


def test_the_whole_past_is_not_touched(bundle: Callable[..., Path]) -> None:
    """Beyond the slots that are asked for nothing is read, not even what is not finite."""
    with lvlm.load(bundle("digits-llava", max_images=2)) as model:
        graphs = model.calls.graphs
        prompt = prompts_of(model)[2]
        counts = count_prompts(graphs.manifest, [prompt], None, None)
        slots = len(prompt.ids) + 40
        text = graphs.manifest.text
        cache = CompactCache(
            graphs.backend, text, "float32", 1, [slots] * text.layers, counts.budgets
        )
        row = cache.views(slice(0, 1))
        expected, _ = graphs.prefill([prompt], counts, [], graphs.bind("prefill", row))
        for buffer in cache.buffers.values():
            buffer[:, :, 5:] = np.nan
        nothing = np.zeros((0, graphs.manifest.feature_width), np.float32)
        span = range(5, len(prompt.ids))
        found = graphs.extend(prompt, span, nothing, graphs.bind("extend", row))
        assert difference(found, expected) < 1e-4
