"""Checks of a manifest beyond the types of its fields: a true description of its graphs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from lvlm.core.errors import BundleError, ParameterError, shown
from lvlm.runtime.bundle.entry_form import side_dtype
from lvlm.runtime.bundle.graph_ports import BITS, check_ports
from lvlm.runtime.bundle.manifest import EncoderReduction, Manifest, Reduction
from lvlm.runtime.reductions import rules

LARGEST = 2**31 - 1  # of sizes, so that products of two can be computed with
GRAPHS = {"vision", "prefill", "decode"}


def check(manifest: Manifest, path: Path) -> None:
    """Raise BundleError for the first thing in the manifest at ``path`` that cannot be."""
    layers = manifest.text.layers
    _check_sizes(manifest, path)
    _check_images(manifest, path)
    _check_reductions(manifest.reductions, layers, path)
    _check_shortenings(manifest, path)
    if manifest.cache_policy is not None:
        try:
            manifest.cache_policy.check_layers(layers)
        except ParameterError as error:
            raise BundleError(f"{path}: {error}; export again") from None
    _check_graphs(manifest, path)
    _check_weights(manifest, path)


def _check_sizes(manifest: Manifest, path: Path) -> None:
    text, images, capacity = manifest.text, manifest.images, manifest.capacity
    layers = text.layers
    if len(capacity.per_layer) != layers:
        raise BundleError(f"{path} lists capacities for another number of layers than {layers}")
    sizes = (
        *dataclasses.astuple(text)[:6],
        *(images.tokens, *images.grid, *images.size, *images.max_dims.values()),
        *(capacity.max_text_len, capacity.max_images, *capacity.per_layer),
    )
    if not 1 <= min(sizes) <= max(sizes) <= LARGEST or not 0 < manifest.keep <= 1:
        raise BundleError(f"{path} has a size or keep ratio out of range; export again")
    if any(
        len(state) != 3 or not 1 <= min(state) <= max(state) <= LARGEST for state in text.states
    ):
        raise BundleError(f"{path} has a state that is not of three sizes; export again")
    if text.state_dtypes and (
        len(text.state_dtypes) != len(text.states)
        or not {"float32", side_dtype(manifest.cache_dtype)}.issuperset(text.state_dtypes)
    ):
        raise BundleError(f"{path} has states of other types than the cache's; export again")
    tokens = (images.token_id, *text.eos_ids)
    if not 0 <= min(tokens) <= max(tokens) < text.vocab:
        raise BundleError(f"{path} names a token that is none of {text.vocab}; export again")
    if (q := manifest.quantization) is not None and (q.bits not in (4, 8) or q.block < 1):
        raise BundleError(
            f"{path} has weights of {q.bits} bits in blocks of {q.block}; export again"
        )


def _check_images(manifest: Manifest, path: Path) -> None:
    images = manifest.images
    if len(images.grid) not in (0, 2) or len(images.size) not in (0, 2):
        raise BundleError(f"{path}: images need a grid and a size of two numbers, or none")
    shared, deepstack = images.shared_rows, images.deepstack_layers
    if not 0 <= shared <= images.tokens or not 0 <= deepstack < manifest.text.layers:
        raise BundleError(
            f"{path}: images share {shared} rows and enter {deepstack} blocks more; export again"
        )
    if not (0 <= images.patches <= LARGEST and 0 <= images.patch_heads <= LARGEST):
        raise BundleError(f"{path}: an image's patches or their heads are out of range")
    if "units" not in images.max_dims:
        raise BundleError(f"{path}: images.max_dims lacks the units; export again")


def _check_graphs(manifest: Manifest, path: Path) -> None:
    compacts = manifest.cache_policy is not None and manifest.cache_policy.interval is not None
    wanted = GRAPHS | ({"compact"} if compacts else set())
    if missing := wanted - set(manifest.graphs):
        raise BundleError(f"{path} lists no {', '.join(sorted(missing))} graph; export again")
    if manifest.question_free and (manifest.cache_policy is not None or manifest.in_place):
        raise BundleError(f"{path} is question_free, which goes with merging alone; export again")
    whole = manifest.text.bidirectional
    if manifest.question_free and whole:
        raise BundleError(
            f"{path} is question_free, with prompts whose tokens see those that follow; export "
            "again"
        )
    # Not in schemas before 6; with most recipes on request alone
    known = wanted | (set() if whole else {"extend"})
    if more := set(manifest.graphs) - known:
        raise BundleError(
            f"{path} lists a graph {shown(min(more))}, which has no use; export again"
        )
    files = [f for g in manifest.graphs.values() for f in (g.file, *g.lowered.values())]
    if unlisted := set(files) - set(manifest.files):
        raise BundleError(f"{path} has no hash for {shown(min(unlisted))}; export again")
    if "tokenizer.json" not in manifest.files:
        raise BundleError(f"{path} has no hash for tokenizer.json; export again")
    check_ports(manifest, path)


def _check_weights(manifest: Manifest, path: Path) -> None:
    """Every graph's weights are listed, and lie inside listed files."""
    if unknown := {w for g in manifest.graphs.values() for w in g.weights} - set(manifest.weights):
        raise BundleError(f"{path} does not list the weight {shown(min(unknown))}; export again")
    for name, w in manifest.weights.items():
        if w.file not in manifest.files:
            what = f"the weight {shown(name)} is in {shown(w.file)}, which is not listed"
        elif w.offset < 0 or w.offset + w.bytes > manifest.files[w.file].bytes:
            what = f"the weight {shown(name)} lies outside its file"
        elif w.dtype not in BITS:
            what = f"the weight {shown(name)} is of the unknown type {shown(w.dtype)}"
        elif min(w.dims, default=1) < 1 or w.bytes != -(-math.prod(w.dims) * BITS[w.dtype] // 8):
            what = f"the weight {shown(name)} has another size than its shape"
        else:
            continue
        raise BundleError(f"{path}: {what}; export again")


def _check_reductions(reductions: tuple[Reduction, ...], layers: int, path: Path) -> None:
    stages = [r.layer for r in reductions]
    if any(not 0 < layer < layers for layer in stages) or stages != sorted(set(stages)):
        raise BundleError(
            f"{path} reduces tokens at layers {shown(stages)} of {layers}; export again"
        )


def _check_shortenings(manifest: Manifest, path: Path) -> None:
    if manifest.encoder is not None:
        _check_encoder(manifest.encoder, path)
    reductions = manifest.shortenings
    for r in reductions:
        # NaN fails every comparison
        fractions = [x for x in (r.ratio, r.recycle) if x is not None]
        steps = [x for x in (r.exponent,) if x is not None]
        usable = all(0 < x <= 1 for x in fractions) and all(0 < x < math.inf for x in steps)
        if not usable or (r.ratio is None) == (r.exponent is None):
            raise BundleError(f"{path} has a reduction out of range ({shown(r)}); export again")
    if len({r.ratio is None for r in reductions}) > 1:
        raise BundleError(f"{path} mixes reductions with and without own ratio; export again")


def _check_encoder(encoder: EncoderReduction, path: Path) -> None:
    rule = rules().get(encoder.rule)
    if rule is None:
        raise BundleError(
            f"{path} has images shortened by {shown(encoder.rule)}, which is none of "
            f"{', '.join(sorted(rules()))}; install what it comes from, or export again"
        )
    try:
        rule.check(encoder.settings)
    except ParameterError as error:
        raise BundleError(f"{path}: {error}; export again") from None
    if not (2 <= encoder.scores <= LARGEST if rule.scored else encoder.scores == 0):
        raise BundleError(
            f"{path}: rule {encoder.rule} with {shown(encoder.scores)} scores a token; export again"
        )
