"""A recipe that needs a profile and was given none: the exporter measures one, and says so."""

from __future__ import annotations

from dataclasses import replace

import torch

from lvlm.core.progress import Progress
from lvlm.export.budgets.calibration_samples import samples_of, what_of
from lvlm.export.budgets.measuring import calibrate
from lvlm.export.budgets.prefix_profiles import identify
from lvlm.export.budgets.sample_prompts import prepare, prompt_maker
from lvlm.export.cache_plan import plan_cache
from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.export.export_plan import ExportPlan
from lvlm.export.reference.torch_reference import Reference, load_fp32


def with_profile(plan: ExportPlan, plain: Checkpoint, progress: Progress) -> ExportPlan:
    """The plan with a profile measured on the recipe's samples, if it still needs one.

    The model computes in fp32 for that, over the weights in their files: ``plain``'s, which holds
    the plan's checkpoint as it is read.
    """
    wanted = plan.recipe.calibration()
    if wanted is None:
        return plan
    samples, what = samples_of(wanted.samples), what_of(wanted.samples)
    with progress.stage(f"calibrate the layers' budgets on {len(samples)} {what}") as stage:
        model = load_fp32(plan.family, plan.config, plain, plan.stored_names, torch.float32)
        reference = Reference(plan.family, plan.config, model, plan.recipe)
        maker = prompt_maker(plan.checkpoint, plan.family, plan.config, plan.images)
        profile = calibrate(
            reference,
            identify(plan.checkpoint),
            (prepare(maker, sample) for sample in samples),
            wanted.keep,
            on_sample=lambda done, _: stage.show(f"{done} of {len(samples)}"),
        )
        at_keep = next(row.fractions for row in profile.rows if row.keep == profile.keep)
        stage.result = f"layers keep {min(at_keep):.0%} to {max(at_keep):.0%}"
    recipe = plan.recipe.with_profile(profile.keep, profile.rows)
    cache = plan_cache(plan.options, recipe, plan.images, plan.skeleton.language, plan.cache_dtype)
    return replace(plan, recipe=recipe, cache=cache, profile=profile)
