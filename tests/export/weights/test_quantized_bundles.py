"""Bundles with quantized weights and caches of lower precision, against torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from parity_tools import ROWS, canonical, make_reference
from settings import ASSETS

import lvlm
from lvlm.core.discovery import discover
from lvlm.core.errors import ExportError
from lvlm.export.budgets.calibration_samples import builtin_samples
from lvlm.export.budgets.sample_prompts import prepare, prompt_maker
from lvlm.export.checkpoint.checkpoint import Checkpoint, find_family
from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.recipes.none import NoCompression
from lvlm.export.reference.rounded_blocks import RoundedBlocks
from lvlm.export.reference.torch_reference import Reference, ReferenceAnswer
from lvlm.export.targets.target import Target
from lvlm.export.weights.packed_linears import exchange_linears
from lvlm.export.weights.quantization import BLOCKS_SUFFIX, WeightQuantization, round_linears
from lvlm.runtime.bundle.manifest import Capacity, Manifest
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions

TARGETS: dict[str, Target] = discover("lvlm.export.targets", "TARGET")
CAPACITY = Capacity(64, 2, (64,) * 6)
# A trained model; random weights with a head of its own beside the embedding, with biases; and a
# cache that is compacted, with a ring of queries. Some of their widths only blocks of 16 divide.
TRAINED: dict[str, Any] = {"weights": "int4", "cache": "fp16"}
TIED: dict[str, Any] = {"weights": "int8", "block_size": 16}
COMPACTED: dict[str, Any] = {"weights": "int4", "block_size": 16, "cache": "fp16"}
LIGHT = ("lightvlm", "kv_keep=0.5", "kv_floor=8", "kv_protect=8", "kv_interval=16")
CALIBRATED: dict[str, Any] = {"weights": "int4", "block_size": 16, "calibrate": ""}
BUNDLES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "trained": ("digits-llava", ("none",), TRAINED),
    "tied": ("llava:qwen2-tied-siglip", ("none",), TIED),
    "calibrated": ("llava:qwen2-tied-siglip", ("none",), CALIBRATED),
    "compacted": ("llava:llama-gqa-clip", LIGHT, COMPACTED),
}
INTERVAL, STEPS = 16, 40


def export(bundle: Callable[..., Path], which: str) -> Path:
    name, (recipe, *settings_), options = BUNDLES[which]
    return bundle(name, recipe, *settings_, max_images=2, **options)


def rounded_reference(which: str, folder: Path, files: Path) -> Reference:
    """torch in fp32, with the weights and the cache rounded as the bundle's are."""
    _, (recipe, *settings_), options = BUNDLES[which]
    reference = make_reference(folder, recipe, *settings_)
    how = WeightQuantization(
        {"int4": 4, "int8": 8}[options["weights"]], options.get("block_size", 32)
    )
    if "calibrate" in options:
        found = rounded_on_samples(folder, how, files)
        exchange_linears(reference.model, reference.language, found)
    else:
        round_linears(reference.language, how, torch.float32)
    reference.cache_dtype = torch.float16 if "cache" in options else torch.float32
    return reference


def rounded_on_samples(
    folder: Path, how: WeightQuantization, files: Path
) -> dict[str, PackedTensor]:
    """The weights of a checkpoint in fp32, rounded once more."""
    source = Checkpoint(folder, "", None)
    family = find_family(source.config, "")
    maker = prompt_maker(source, family, family.read_config(source.config))
    prompts = [prepare(maker, sample) for sample in builtin_samples()]
    return RoundedBlocks(how, torch.float32, files).of(make_reference(folder, "none"), prompts)


def follow(model: Model, answers: Sequence[ReferenceAnswer]) -> list[np.ndarray]:
    """Logits [B,vocabulary] of every step when the tokens are those of ``answers``."""
    options = GenerationOptions(chat_template=False, max_new_tokens=STEPS)
    batch = model.calls.start([model.prepare(0, *row, options) for row in ROWS])
    logits = []
    for step in range(STEPS):
        logits.append(batch.logits.copy())
        if step + 1 < STEPS:
            batch.feed([answer.tokens[step] for answer in answers])
    return logits


@pytest.mark.parametrize("which", BUNDLES)
def test_bundles_equal_torch_with_rounded_weights_and_cache(
    which: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """The canonical graphs compute what torch does; the lowered ones of the CPU round the rows they
    multiply to 8 bits."""
    folder = export(bundle, which)
    reference = rounded_reference(which, checkpoint(BUNDLES[which][0]), tmp_path)
    answers = []
    with lvlm.load(folder) as model:
        for row in ROWS:
            prompt = model.prepare(0, *row, GenerationOptions(chat_template=False))
            features = reference.encode(prompt.images)
            answers.append(reference.generate(prompt, features, max_new_tokens=STEPS))
        fast = follow(model, answers)
    with lvlm.load(canonical(folder, tmp_path / "canonical")) as model:
        exact = follow(model, answers)
    assert len({tuple(answer.tokens) for answer in answers}) == len(ROWS)
    alike = sure = 0
    for step in range(STEPS):
        wanted = np.stack([answer.logits[step].numpy() for answer in answers])
        largest = np.abs(wanted).max()
        near = 2e-3 * largest
        assert np.abs(exact[step] - wanted).max() < near
        # Random weights amplify rounding, and where it decides which entries compaction drops,
        # the answers go different ways.
        if which != "compacted" or step < INTERVAL:
            limit = 5e-2 if which == "trained" else 0.1
            assert np.abs(fast[step] - wanted).max() < limit * largest
        tokens = np.array([answer.tokens[step] for answer in answers])
        second, best = np.sort(wanted, axis=1)[:, -2:].T
        decided = best - second > 2 * near
        assert (exact[step].argmax(1) == tokens)[decided].all()
        sure += int(decided.sum())
        alike += int((fast[step].argmax(1) == tokens).sum())
    assert sure > 0.9 * STEPS * len(ROWS)
    if which == "trained":  # random weights leave many tokens undecided
        assert alike >= 0.95 * STEPS * len(ROWS)


@pytest.mark.parametrize("which", BUNDLES)
def test_graphs_hold_quantized_products_only(which: str, bundle: Callable[..., Path]) -> None:
    folder = export(bundle, which)
    manifest = read_bundle(folder)
    bits = BUNDLES[which][2]["weights"]
    for name in ("prefill", "decode"):
        graph = manifest.graphs[name]
        onnx.checker.check_model(folder / graph.file)
        kinds, weights = _contents(folder / graph.file)
        assert kinds["DequantizeLinear"] == sum(w.endswith(f".{bits}") for w in weights) > 0
        assert not any(w.endswith("_proj.weight") for w in weights)
        lowered, _ = _contents(folder / graph.lowered["ort-cpu"])
        own = lowered["BlockLinear"] + lowered["ZeroedBlockLinear"]  # functions of it
        assert lowered["MatMulNBits"] + own == kinds["DequantizeLinear"]
        assert (own > 0) == (bits == "int8" and name == "prefill")
        assert lowered["DequantizeLinear"] == 0
    assert "ort-cpu" not in manifest.graphs["vision"].lowered


def _contents(path: Path) -> tuple[Counter[str], list[str]]:
    graph = onnx.load(path, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node), [w.name for w in graph.initializer]


def test_everything_is_stored_once(bundle: Callable[..., Path]) -> None:
    folder = export(bundle, "trained")
    manifest = read_bundle(folder)
    places: dict[int, set[int]] = {}
    for weight in manifest.weights.values():
        places.setdefault(weight.offset, set()).add(weight.bytes)
    by_offset = sorted((offset, max(sizes)) for offset, sizes in places.items())
    for (offset, size), (following, _) in itertools.pairwise(by_offset):
        assert offset + size <= following
    blocks = [name for name in manifest.weights if name.endswith(BLOCKS_SUFFIX)]
    assert len(blocks) == 6 * 4 + 1  # fused: qkv, o, gate and up, down; the head
    assert {name for graph in manifest.graphs.values() for name in graph.weights} == set(
        manifest.weights
    )


def test_planned_bytes_are_those_written(bundle: Callable[..., Path], tmp_path: Path) -> None:
    """What low-precision weights save; plans also count the parameters that no graph uses."""
    given = ExportOptions(
        str(ASSETS / "digits-llava"), NoCompression(), tmp_path / "x", "fp32", max_images=2
    )
    full, narrow = make_plan(given), make_plan(dataclasses.replace(given, **TRAINED))
    files = [bundle("digits-llava", max_images=2), export(bundle, "trained")]
    sizes = [read_bundle(folder).files["weights.bin"].bytes for folder in files]
    padding = 4096 * len(read_bundle(files[1]).weights)
    assert abs(full.weight_bytes - narrow.weight_bytes - (sizes[0] - sizes[1])) < padding
    assert full.cache.bytes == 2 * narrow.cache.bytes


def test_a_low_precision_cache_takes_half(bundle: Callable[..., Path]) -> None:
    text, images = ROWS[0]
    options: dict[str, Any] = {"max_new_tokens": 2, "chat_template": False}
    with lvlm.load(bundle("digits-llava", max_images=2)) as model:
        full = model.generate(text, images, **options).stats
    with lvlm.load(export(bundle, "trained")) as model:
        assert model.manifest.dtype == "float32"
        assert model.manifest.cache_dtype == "float16"
        half = model.generate(text, images, **options).stats
    assert half.cache_bytes_allocated * 2 == full.cache_bytes_allocated
    assert half.cache_bytes_used * 2 == full.cache_bytes_used


@pytest.mark.parametrize(
    "name", [t.name for t in TARGETS.values() if not t.low_precision and t.built]
)
def test_engines_are_refused_by_name(name: str, bundle: Callable[..., Path]) -> None:
    """A low-precision cache; also where a bundle lacks the target's graphs."""
    folder = export(bundle, "trained")
    with pytest.raises(ExportError, match=f"target {name} does not take a cache of lower prec"):
        TARGETS[name].lower(ir.load(folder / "decode.onnx"), CAPACITY)


def test_rounding_leaves_embedding_and_vision(checkpoint: Callable[[str], Path]) -> None:
    """A head that shares its weight with the embedding gets one of its own."""
    folder = checkpoint(BUNDLES["tied"][0])
    source = Checkpoint(folder, "", None)
    reference = make_reference(folder, "none")
    before = {name: p.clone() for name, p in reference.model.named_parameters()}
    round_linears(reference.language, WeightQuantization(8, 16), torch.float32)
    changed = {n for n, p in reference.model.named_parameters() if not p.equal(before.get(n, p))}
    assert changed
    assert all("_proj.weight" in name and "layers" in name for name in changed)
    assert not any("vision" in name for name in changed)
    embedding = reference.language.embed.weight
    assert isinstance(embedding, torch.Tensor)
    assert not embedding.equal(reference.language.head.weight)  # type: ignore[arg-type]
    assert source.config["tie_word_embeddings"]


def test_a_manifest_says_what_weights_were_rounded_on(bundle: Callable[..., Path]) -> None:
    found = read_bundle(export(bundle, "calibrated")).model["calibration"]
    digest, tokens = found.pop("sha256"), found.pop("tokens")
    assert found == {"method": "gptq", "block": 16, "samples": 8}
    assert len(digest) == 64
    assert tokens > 8
    assert "calibration" not in read_bundle(export(bundle, "tied")).model


def test_a_manifest_says_what_is_quantized(bundle: Callable[..., Path]) -> None:
    manifest: Manifest = read_bundle(export(bundle, "tied"))
    assert manifest.quantization is not None
    assert (manifest.quantization.bits, manifest.quantization.block) == (8, 16)
    assert manifest.cache_dtype == manifest.dtype == "float32"
