"""Everything known before any work: checkpoint, family, recipe, sizes. What --dry-run prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

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
from lvlm.export.cache_plan import CachePlan, check_length, plan_cache
from lvlm.export.checkpoint import checkpoint as checkpoints
from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor
from lvlm.export.export_options import CACHES, DTYPES, ExportOptions
from lvlm.export.families.family import Family, PromptFiles
from lvlm.export.graphs.bundle_graphs import score_width
from lvlm.export.graphs.skeleton import Skeleton
from lvlm.export.recipes.recipe import Recipe
from lvlm.export.reference.rounded_blocks import rounding_memory
from lvlm.export.weight_plan import added_bytes, check_packed, check_storage, packed_linears
from lvlm.export.weights.merge_adapter import with_adapter
from lvlm.export.weights.weight_names import open_skeleton
from lvlm.runtime.bundle.manifest import EncoderReduction, Images, Quantization
from lvlm.runtime.processors import load_processor


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
    layers = len(language.attending)
    recipe = options.recipe.for_layers(layers, language.deepstack_layers)
    recipe = _with_profile_file(recipe, layers, checkpoint)
    deepstack = language.deepstack_layers
    if early := [r.layer for r in recipe.reductions() if r.layer < deepstack]:
        raise ParameterError(
            f"recipe {recipe.name} merges image tokens at block {early[0]}, but this model adds "
            f"image features up to block {deepstack - 1}; merge from block {deepstack} on "
            "(--help-recipe)"
        )
    if (apart := len(language.layers) - layers) and recipe.reductions():
        raise ParameterError(
            f"recipe {recipe.name} merges or drops image tokens inside the language model, but "
            f"{apart} of its {len(language.layers)} layers take all tokens side by side into a "
            "state; take divprune, or a recipe that compresses the cache"
        )
    rule = recipe.cache_rule()
    if language.bidirectional and rule is not None and rule.remembers_prompts:
        raise ParameterError(
            f"recipe {recipe.name} would rank entries by queries of {language.bidirectional} "
            f"tokens as if these did not see what follows, which those of {family.name} do; "
            f"compact after as many steps as there are queries ({rule.queries}) or more"
        )
    if language.bidirectional == "prompt" and options.sessions:
        raise ParameterError(
            f"--sessions: tokens of a prompt of {family.name} see those that follow, so that every "
            "turn is read as a whole; leave it out"
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
    check_length(options, images, language, recipe)
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
