"""An export that rounds its weights on samples: into files, until the bundle has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lvlm.core.errors import ParameterError
from lvlm.core.progress import Progress
from lvlm.export.budgets.calibration_samples import samples_of, what_of
from lvlm.export.budgets.measuring import digest, prompt_hash
from lvlm.export.budgets.sample_prompts import prepare, prompt_maker
from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.export.estimates import check_memory
from lvlm.export.export_plan import Calibrated, ExportPlan
from lvlm.export.recipes.none import NoCompression
from lvlm.export.reference.rounded_blocks import RoundedBlocks
from lvlm.export.reference.torch_reference import Reference, load_fp32
from lvlm.export.weights.gptq_rounding import METHOD

HELD = 3  # numbers per token and hidden unit: before a block, behind it, and what is between


def with_calibrated_weights(
    plan: ExportPlan, plain: Checkpoint, folder: Path, progress: Progress
) -> ExportPlan:
    """The plan with weights rounded on the samples of its options, in files of ``folder``.

    The model computes in fp32 for that, over ``plain``'s weights in their files, and reads all
    tokens, whatever the recipe. Raises LvlmError.
    """
    how, file = plan.options.quantization, plan.options.samples
    assert how is not None
    samples = samples_of(file)
    with progress.stage(f"round weights on {len(samples)} {what_of(file)}") as stage:
        maker = prompt_maker(plan.checkpoint, plan.family, plan.config, plan.images, plan.prompt)
        prompts = [prepare(maker, sample) for sample in samples]
        tokens = sum(len(prompt.ids) for prompt in prompts)
        images = (image for prompt in prompts for image in prompt.images)
        pixels = sum(array.nbytes for image in images for array in image.arrays.values())
        held = pixels + 4 * HELD * tokens * plan.skeleton.language.feature_width
        check_memory(
            f"rounding weights on {tokens:,} tokens",
            plan.unvalidated_bytes + held,
            {"give fewer or shorter samples": plan.unvalidated_bytes},
        )
        longest = plan.skeleton.language.longest
        for prompt, sample in zip(prompts, samples, strict=True):
            if longest is not None and len(prompt.ids) > longest:
                raise ParameterError(
                    f"{sample.where}: {len(prompt.ids):,} tokens, and this model attends over "
                    f"{longest:,} only; shorten it"
                )
        model = load_fp32(plan.family, plan.config, plain, plan.stored_names, plan.dtype)
        rounding = RoundedBlocks(
            how, plan.dtype, folder, lambda n, count: stage.show(f"block {n} of {count}")
        )
        reference = Reference(plan.family, plan.config, model, NoCompression())
        found = rounding.of(reference, prompts)
        stage.result = f"{len(found)} linear layers, {tokens:,} tokens"
    record = {
        "method": METHOD,
        "block": how.block,
        "samples": len(samples),
        "tokens": tokens,
        "sha256": digest(*(prompt_hash(prompt) for prompt in prompts)),
    }
    tensors = {plan.stored_names[name]: tensor for name, tensor in found.items()}
    return replace(plan, calibrated=Calibrated(tensors, record))
