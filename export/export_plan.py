"""Everything known before any work: checkpoint, family, recipe, sizes. What --dry-run prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lvlm.core.errors import ParameterError
from lvlm.export import estimates
from lvlm.export.budgets.calibration_samples import read_samples, samples_of
from lvlm.export.budgets.prefix_profiles import (
    PrefixProfile,
    check_profile,
    model_hash,
    read_profile,
)
from lvlm.export.budgets.sample_prompts import prompt_maker
from lvlm.export.checkpoint import checkpoint as checkpoints
from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor
from lvlm.export.export_options import CACHES, DTYPES, ExportOptions
from lvlm.export.families.family import Family, PromptFiles
from lvlm.export.graphs.bundle_graphs import score_width
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.skeleton import Skeleton
from lvlm.export.recipes.recipe import Recipe
from lvlm.export.reference.rounded_blocks import rounding_memory
from lvlm.export.weight_plan import added_bytes, check_packed, check_storage, packed_linears
from lvlm.export.weights.merge_adapter import with_adapter
from lvlm.export.weights.weight_names import open_skeleton
from lvlm.runtime.bundle.manifest import Capacity, EncoderReduction, Images, Quantization
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.image_tokens import keep_ratios, max_entering, tokens_per_layer
from lvlm.runtime.processors import load_processor

LONGEST = 2**20  # tokens of a prompt, images and all, that a bundle has room for


@dataclass(frozen=True)
class CachePlan:
    """Tokens of one image that enter each layer, the capacities, and their bytes for one
    sequence."""

    image_tokens: list[int]
    capacity: Capacity
    bytes: int


@dataclass(frozen=True)
class Calibrated:
    """Weights that were rounded on samples: every linear layer's tensor, by name in the checkpoint,
    and what they were rounded by, for the manifest."""

    tensors: Mapping[str, PackedTensor]
    record: dict[str, Any]


@dataclass(frozen=True)
class ExportPlan:
    """Everything known before any work: what ``--dry-run`` prints."""

    options: ExportOptions
    checkpoint: checkpoints.Checkpoint
    family: Family
    config: Any
    dtype: torch.dtype
    cache_dtype: torch.dtype
    images: Images
    prompt: PromptFiles
    recipe: Recipe
    skeleton: Skeleton
    stored_names: dict[str, str]
    weight_bytes: int
    angle_bytes: int  # of the rotary angles of every position
    cache: CachePlan
    peak_bytes: int
    unvalidated_bytes: int  # the same without validation
    packed: Mapping[str, PackedTensor] = field(default_factory=dict)  # that stay quantized
    profile: PrefixProfile | None = None  # measured by this export
    calibrated: Calibrated | None = None  # by this export

    @property
    def measured(self) -> bool:
        """True where this export measures a profile."""
        wanted = self.options.recipe.calibration()
        return wanted is not None and wanted.file is None

    @property
    def runs_first(self) -> bool:
        """True where the checkpoint reads samples before anything is written."""
        return self.measured or self.options.calibrate is not None

    @property
    def quantization(self) -> Quantization | None:
        """The storage of linear layers; of those that come quantized, the first one's."""
        how = self.options.quantization
        if how is not None:
            return Quantization(how.bits, how.block)
        first = next(iter(self.packed.values()), None)
        return None if first is None else Quantization(first.bits, first.block or 0)

    @property
    def encoder(self) -> EncoderReduction | None:
        """The reduction of image tokens before the language model, with this tower's scores."""
        reduction = self.recipe.encoder_reduction()
        if reduction is None or not self.recipe.scored:
            return reduction
        return replace(reduction, scores=score_width(self.skeleton.vision))


def make_plan(options: ExportOptions, *, weights: bool = True, quiet: bool = False) -> ExportPlan:
    """Resolve and check everything that can be checked without tracing.

    Args:
        weights: whether to download them where they are on the hub only; without, their headers
            are read.
        quiet: show no progress of a download.
    """
    checkpoint = checkpoints.resolve(options.model, options.revision, weights=weights, quiet=quiet)
    if options.lora is not None:
        if checkpoint.adapter is not None:
            raise ParameterError(
                f"--lora {options.lora}: {options.model} is an adapter, too; give the base model "
                "with -m"
            )
        checkpoint = replace(checkpoint, adapter=options.lora)
    with checkpoints.described_by(checkpoint):
        return _plan_of(checkpoint, options)


def _plan_of(checkpoint: checkpoints.Checkpoint, options: ExportOptions) -> ExportPlan:
    family = checkpoints.find_family(checkpoint.config, checkpoint.source)
    config = family.read_config(checkpoint.config)
    dtype = DTYPES[options.dtype] if options.dtype else _stored_dtype(config, checkpoint)
    cache_dtype = CACHES[options.cache] if options.cache else dtype
    check_storage(options, checkpoint, dtype)
    skeleton, stored_names = open_skeleton(checkpoint, family, config, dtype)
    checkpoint = with_adapter(checkpoint, skeleton.model, stored_names, dense=options.dequantize)
    packed = packed_linears(options, checkpoint, skeleton, stored_names)
    check_packed(options.targets, list(packed.values()))
    language = skeleton.language
    layers = len(language.blocks)
    recipe = options.recipe.for_layers(layers, language.deepstack_layers)
    recipe = _with_profile_file(recipe, layers, checkpoint)
    deepstack = language.deepstack_layers
    if early := [r.layer for r in recipe.reductions() if r.layer < deepstack]:
        raise ParameterError(
            f"recipe {recipe.name} merges image tokens at block {early[0]}, but this model adds "
            f"image features up to block {deepstack - 1}; merge from block {deepstack} on "
            "(--help-recipe)"
        )
    rule = recipe.cache_rule()
    if language.bidirectional and rule is not None and rule.remembers_prompts:
        raise ParameterError(
            f"recipe {recipe.name} would rank entries by queries of image tokens as if these did "
            f"not see what follows, which those of {family.name} do; compact after as many steps "
            f"as there are queries ({rule.queries}) or more"
        )
    images = family.images(config, checkpoint.folder)
    if recipe.scored and not score_width(skeleton.vision):
        raise ParameterError(
            f"recipe {recipe.name} ranks image tokens by the attention of the vision tower, which "
            f"is not read out of {family.name}'s; take divprune"
        )
    encoder = recipe.encoder_reduction()
    if recipe.temporal and getattr(load_processor(images.processor), "video", None) is None:
        raise ParameterError(
            f"recipe {recipe.name} shortens videos, and this model takes none; take divprune"
        )
    if images.positions == "grid" and encoder is not None and encoder.places == "closed":
        raise ParameterError(
            f"places=closed: tokens of {family.name} have three positions each, which cannot be "
            "closed up; leave places out"
        )
    if options.max_image_tokens is not None and options.max_image_tokens < images.tokens:
        images = family.bounded(images, options.max_image_tokens)
    prompt = family.prompt(config, checkpoint.folder)
    prompt_maker(checkpoint, family, config, images, prompt)  # raises what a load would
    _check_length(options, images, language, recipe)
    tokens = options.max_text_len + options.max_images * images.tokens
    skeleton = replace(skeleton, language=language.within(tokens))
    unique = {id(p): p for p in skeleton.model.parameters()}.values()
    parameters, largest = sum(p.numel() for p in unique), max(p.numel() for p in unique)
    weight_bytes = parameters * dtype.itemsize + added_bytes(options, skeleton, packed, dtype)
    angles = 4 * tokens * language.head_dim
    sizes = {"weight_bytes": weight_bytes, "largest": largest, "angles": angles}
    if options.calibrate is not None:
        samples_of(options.samples)  # read later; mistakes in them are said now
        sizes["calibrating"] = rounding_memory(language)
    peak, unvalidated = (
        estimates.peak_memory(options, **sizes, dtype=dtype, validate=validate)
        for validate in (options.validate, False)
    )
    return ExportPlan(
        options=options,
        checkpoint=checkpoint,
        family=family,
        config=config,
        dtype=dtype,
        cache_dtype=cache_dtype,
        images=images,
        prompt=prompt,
        recipe=recipe,
        skeleton=skeleton,
        stored_names=stored_names,
        weight_bytes=weight_bytes,
        angle_bytes=angles,
        cache=plan_cache(options, recipe, images, language, cache_dtype),
        peak_bytes=peak,
        unvalidated_bytes=unvalidated,
        packed=packed,
    )


def _check_length(
    options: ExportOptions, images: Images, language: LanguageModel, recipe: Recipe
) -> None:
    """ParameterError where prompts could be longer than the model is made for (images may go
    beyond: few prompts have as many, and as large ones, as there is room for), or than graphs with
    the recipe can do."""
    text, image_tokens = options.max_text_len, options.max_images * images.tokens
    if text > language.positions:
        raise ParameterError(
            f"--max-text-len {text}: this model is made for {language.positions:,} tokens; "
            f"give {language.positions} or less"
        )
    if language.longest is not None and language.longest < text + image_tokens:
        raise ParameterError(
            f"this model attends over {language.longest} tokens only; lower "
            f"{_lower(language.longest - image_tokens)}"
        )
    hiding = language.windowed(text + image_tokens)
    if hiding and not recipe.in_place:
        window = min(one.window for one in language.layers if one.window is not None)
        more = f" and {len(hiding) - 3} more" if len(hiding) > 3 else ""
        raise ParameterError(
            f"recipe {recipe.name} cannot do layers with a window (sliding_window {window}: layers "
            f"{', '.join(map(str, hiding[:3]))}{more}); take recipe none, or divprune "
            f"with kv=none, or lower {_lower(window - image_tokens)}"
        )
    max_images = (LONGEST - text) // images.tokens
    if options.max_images > max(1, max_images):
        raise ParameterError(
            f"--max-images {options.max_images}: with up to {images.tokens} tokens each, a bundle "
            f"has room for {max_images:,}; lower it, or --max-image-tokens"
        )


def _lower(room: int) -> str:
    """The flag to lower where ``room`` tokens of text are possible."""
    return f"--max-text-len to {room} or less" if room > 0 else "--max-images"


def plan_cache(
    options: ExportOptions,
    recipe: Recipe,
    images: Images,
    language: LanguageModel,
    dtype: torch.dtype,
) -> CachePlan:
    """Entries per layer that the longest prompt and answer can ever occupy."""
    layers = len(language.blocks)
    reductions, rule = recipe.shortenings(), recipe.cache_rule()
    ratios = keep_ratios(reductions, float(recipe.parameters().get("keep", 1.0)), None)
    entering = tokens_per_layer(reductions, ratios, images.tokens, layers)
    of_images = max_entering(reductions, ratios, images.tokens, layers, options.max_images)
    seen = np.array([options.max_text_len + n for n in of_images])
    budgets = Budgets.of(rule.cache_policy if rule else None, layers, None)
    per_layer = tuple(budgets.limit(seen, options.max_text_len - 1).tolist())
    entries = 2 * language.kv_heads * sum(per_layer)
    rings = language.heads * (rule.queries if rule else 0) * layers
    return CachePlan(
        entering,
        Capacity(options.max_text_len, options.max_images, per_layer),
        (entries + rings) * language.head_dim * dtype.itemsize,
    )


def _with_profile_file(recipe: Recipe, layers: int, checkpoint: checkpoints.Checkpoint) -> Recipe:
    """The recipe with the profile from the file it names, checked against the model."""
    wanted = recipe.calibration()
    if wanted is not None and wanted.samples is not None:
        read_samples(wanted.samples)  # measured on later; mistakes in them are said now
    if wanted is None or wanted.file is None:
        return recipe
    profile = read_profile(wanted.file)
    if not checkpoint.absent:  # or else their content is not known yet
        check_profile(profile, layers, model_hash(checkpoint))
    return recipe.with_profile(profile.keep, profile.rows)


def _stored_dtype(config: Any, checkpoint: checkpoints.Checkpoint) -> torch.dtype:
    """The data type as transformers chooses it: config.json's where it names one, or else the
    weights' own."""
    dtype = config.dtype or checkpoint.stored_dtype()
    if dtype not in DTYPES.values():
        where = "config.json says" if config.dtype else "the weights are of"
        raise ParameterError(
            f"{where} dtype {str(dtype).removeprefix('torch.')}; choose one with --dtype"
        )
    assert isinstance(dtype, torch.dtype)
    return dtype
