"""Prompts of a checkpoint that was not exported: samples as prefill takes them."""

from __future__ import annotations

from typing import Any

from lvlm.core.errors import BundleError, CheckpointError, LvlmError
from lvlm.export.budgets.calibration_samples import CalibrationSample
from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.export.families.family import Family, PromptFiles
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.prompts import Prompt, PromptMaker
from lvlm.runtime.prompt.text import Tokenizer


def prompt_maker(
    checkpoint: Checkpoint,
    family: Family,
    config: Any,
    images: Images | None = None,
    files: PromptFiles | None = None,
) -> PromptMaker:
    """A prompt maker that writes prompts exactly as a bundle of this checkpoint does. Raises
    CheckpointError.

    ``images`` are the bundle's where they are not simply the checkpoint's; ``files`` what is known
    of its small files.
    """
    files = files or family.prompt(config, checkpoint.folder)
    try:
        maker = PromptMaker(
            Tokenizer.of_text(files.tokenizer, files.eos_ids),
            images or family.images(config, checkpoint.folder),
            config.get_text_config().vocab_size,
            files.chat_template,
            files.special_tokens,
            generation=files.generation,
        )
    except BundleError as error:
        reason = str(error).removesuffix("; export the bundle again")
        reason = reason.replace("the bundle's ", "its ")
        raise CheckpointError(f"{checkpoint.source} gives no prompts: {reason}") from None
    template = maker.template
    if template is not None and template.forbidden and not template.writes_questions:
        raise CheckpointError(
            f"{checkpoint.source} gives no prompts: its chat template asks for what templates may "
            f"not: {template.forbidden}"
        )
    return maker


def prepare(maker: PromptMaker, sample: CalibrationSample) -> Prompt:
    """A sample as prefill takes it; errors name the sample. Without a chat template the question
    follows its images as it stands."""
    text, templated = sample.prompt, maker.template is not None
    if not templated and maker.images.token not in text:
        text = f"{maker.images.token}\n" * len(sample.images) + text
    options = GenerationOptions(chat_template=templated, max_new_tokens=1)
    try:
        return maker.prepare(0, text, sample.images, options)
    except LvlmError as error:
        raise type(error)(f"{sample.where}: {error}") from None
