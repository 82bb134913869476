"""One calibration: everything is checked, then the model is loaded and reads the samples."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lvlm.calibration.profile.profile_plot import draw_profile
from lvlm.core.errors import ParameterError, PromptError
from lvlm.core.progress import Progress, Stage
from lvlm.export.budgets.calibration_samples import CalibrationSample
from lvlm.export.budgets.measuring import calibrate
from lvlm.export.budgets.prefix_profiles import PrefixProfile, identify
from lvlm.export.budgets.sample_prompts import prepare, prompt_maker
from lvlm.export.checkpoint import checkpoint as checkpoints
from lvlm.export.estimates import check_memory, running_memory
from lvlm.export.families.family import Family
from lvlm.export.recipes.recipe import Recipe
from lvlm.export.reference.torch_reference import Reference, load_fp32
from lvlm.export.weights.merge_adapter import with_adapter
from lvlm.export.weights.weight_names import open_skeleton
from lvlm.runtime.prompt.prompts import PromptMaker

STAGES = 4


@dataclass(frozen=True)
class CalibrationJob:
    """One calibration: everything found and checked, but the samples not yet opened."""

    checkpoint: checkpoints.Checkpoint
    family: Family
    config: Any
    stored_names: dict[str, str]
    longest: int | None
    recipe: Recipe
    maker: PromptMaker
    samples: list[CalibrationSample]
    keep: float
    output: Path

    @property
    def plot(self) -> Path:
        return self.output.with_suffix(".png")

    @property
    def work(self) -> Path:
        """Finished samples of a run that was cut short."""
        return self.output.with_name(f"{self.output.name}.partial.jsonl")


def plan(
    model: str,
    revision: str | None,
    recipe: Recipe,
    samples: list[CalibrationSample],
    keep: float,
    output: Path,
) -> CalibrationJob:
    """Resolve and check the checkpoint and the recipe, without loading weights."""
    checkpoint = checkpoints.resolve(model, revision)
    with checkpoints.described_by(checkpoint):
        return _job(checkpoint, recipe, samples, keep, output)


def _job(
    checkpoint: checkpoints.Checkpoint,
    recipe: Recipe,
    samples: list[CalibrationSample],
    keep: float,
    output: Path,
) -> CalibrationJob:
    family = checkpoints.find_family(checkpoint.config, checkpoint.source)
    config = family.read_config(checkpoint.config)
    skeleton, names = open_skeleton(checkpoint, family, config, torch.float32)
    checkpoint = with_adapter(checkpoint, skeleton.model, names)
    language = skeleton.language
    recipe = recipe.for_layers(len(language.attending), language.deepstack_layers)
    if recipe.name != "none" and not recipe.shortenings():
        raise ParameterError(
            f"recipe '{recipe.name}' merges no tokens, so it changes nothing here; leave --recipe "
            "out, and give the profile to lvlm-export"
        )
    largest = max(p.numel() for p in skeleton.model.parameters())
    made = sum(4 * torch.Size(tensor.shape).numel() for tensor in checkpoint.made.values())
    check_memory("measuring", running_memory(largest) + made)
    return CalibrationJob(
        checkpoint=checkpoint,
        family=family,
        config=config,
        stored_names=names,
        longest=language.full_length,
        recipe=recipe,
        maker=prompt_maker(checkpoint, family, config),
        samples=samples,
        keep=keep,
        output=output,
    )


def measure(job: CalibrationJob, progress: Progress) -> PrefixProfile:
    """The profile, written with its plot. What is finished survives an interrupt in ``work``."""
    with progress.stage(f"check {len(job.samples)} samples") as stage:
        _check_samples(job)
    with progress.stage("open the model, to compute in fp32") as stage:
        model = load_fp32(job.family, job.config, job.checkpoint, job.stored_names, torch.float32)
        reference = Reference(job.family, job.config, model, job.recipe)
        stage.result = f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters"
    with progress.stage("measure importances") as stage:
        profile = _read_samples(job, reference, stage)
    with progress.stage("write the profile and its plot") as stage:
        draw_profile(profile, job.plot)
        profile.write(job.output)
        job.work.unlink(missing_ok=True)
    return profile


def _check_samples(job: CalibrationJob) -> None:
    """Every sample is prepared once, so that a bad one is known before hours of work."""
    for sample in job.samples:
        length = len(prepare(job.maker, sample).ids)
        if job.longest is not None and length > job.longest:
            raise PromptError(
                f"{sample.where}: {length} tokens, but this model attends over {job.longest} only; "
                "shorten it"
            )


def _read_samples(job: CalibrationJob, reference: Reference, stage: Stage) -> PrefixProfile:
    total, reused = len(job.samples), 0

    def on_sample(done: int, remembered: bool) -> None:
        nonlocal reused
        reused += remembered
        stage.add_item(done, total, skipped=reused)

    prompts = (prepare(job.maker, sample) for sample in job.samples)
    try:
        profile = calibrate(
            reference,
            identify(job.checkpoint),
            prompts,
            job.keep,
            work=job.work,
            on_sample=on_sample,
        )
    except KeyboardInterrupt:
        if not stage.progress.quiet and job.work.exists():
            print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise
    stage.result = f"{total} samples" + (f", {reused} from an earlier run" if reused else "")
    return profile
