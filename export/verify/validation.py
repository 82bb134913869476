"""Validation of a bundle against its checkpoint; transformers' own loading is the judge.

First what goes into the model (pixels, chat template, token ids, end of text), then the canonical
graphs with nothing merged or dropped against transformers' generate, then every form of the graphs
that can be run here, with the recipe as exported, against the recipe's torch reference. Where the
bundle's weights or cache are of low precision, so are the reference's: whether the export is
right is one question, what the rounding costs another, which is answered beside it. In the end the
bundle's own answers are recorded, for devices that have nothing else to compare with.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from lvlm.core.errors import LvlmError, ValidationError
from lvlm.export.verify import contents, model_inputs
from lvlm.export.verify.against_reference import against_reference, chooses, low_precision
from lvlm.export.verify.checks import TOLERANCE, UNIT, Check, difference, wrong_tokens
from lvlm.export.verify.graph_forms import Opened, canonical
from lvlm.export.verify.judge import Judge, Verdict
from lvlm.export.verify.outcome import ValidationOutcome
from lvlm.export.verify.recording import record
from lvlm.export.verify.run import run_form, whole
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.generate.call_plan import count_prompts, read_at
from lvlm.runtime.prompt.prompts import Prompt, PromptMaker
from lvlm.runtime.prompt.text import Tokenizer

if TYPE_CHECKING:
    from lvlm.export.export_plan import ExportPlan

IMAGE, OTHER = "samples/digits-1.png", "samples/digits-2.png"
TOKENS = 24  # most that are compared
# Of weights that are stored wider than the bundle has them: bf16 has 8 bits.
ROUNDED_TOLERANCE = {torch.float16: 5e-2, torch.bfloat16: 2e-1}


def validate(
    plan: ExportPlan, folder: Path, tell: Callable[[str], None] = lambda _: None
) -> ValidationOutcome:
    """All checks of a finished bundle; ValidationError with the table if one fails."""
    manifest, outcome = read_bundle(folder, "none"), ValidationOutcome()
    judge = Judge(plan.checkpoint.folder)
    judge.load_model(plan.checkpoint.stored_dtype() or plan.dtype)
    maker = _prompt_maker(folder, manifest)
    image = _image(IMAGE)
    outcome.checks.append(contents.planned(plan, manifest))
    outcome.checks.append(model_inputs.eos(judge, manifest.text.eos_ids))
    outcome.checks.append(contents.choosing(judge, manifest))
    if (rows := contents.embedding(judge, folder, manifest)) is not None:
        outcome.checks.append(rows)
    else:
        outcome.notes.append("rows of the embedding: only those of the prompt are compared")
    try:
        prompt = model_inputs.prepare(maker, image, TOKENS + 1)
        max_tokens = _room(manifest, prompt)
    except LvlmError as error:
        outcome.add(model_inputs.texts(judge, maker))
        outcome.check()
        raise ValidationError(f"the bundle takes no prompt with an image: {error}") from None
    resized = manifest.images.tokens < plan.family.images(plan.config, judge.folder).tokens
    if resized:
        outcome.notes.append("pixels: not compared, --max-image-tokens scales images down")
    outcome.add(model_inputs.compare(judge, plan.family, maker, image, prompt, not resized))
    if judge.images is None:
        outcome.notes.append(f"pixels: not compared, {judge.no_images}")
    if judge.without:
        outcome.notes.append(f"tokens around images: not compared, {judge.without}")
    outcome.check()  # nothing else can be right
    alike = judge.exact and not resized
    pixels = judge.pixels(image) if alike else plan.family.transformers_inputs(prompt)
    verdict = judge.answer(prompt.ids, pixels, {judge.image_id}, max_tokens, tell)
    outcome.estimate = verdict.estimate
    del judge
    gc.collect()
    opened: Opened = {}
    _against_judge(plan, folder, manifest, prompt, verdict, opened, outcome)
    outcome.check()
    steps = len(verdict.logits)
    found = against_reference(plan, folder, manifest, prompt, steps, opened)
    if not found.passed and chooses(manifest):
        # Two orders of the same sum may rank near ties differently; hardly so for two images
        other = model_inputs.prepare(maker, _image(OTHER), TOKENS + 1)
        again = against_reference(plan, folder, manifest, other, steps, opened)
        if again.passed:
            again.notes.append(f"{OTHER} instead of {IMAGE}, in which ranks are near ties")
            found = again
    outcome.add(found)
    outcome.check()
    # As above, unless steps take long
    shown = [IMAGE, OTHER] if chooses(manifest) and steps == max_tokens else [IMAGE]
    # A template that writes today's date asks something else tomorrow
    template = maker.template is not None and not maker.template.dated
    for name in shown:
        prompt = model_inputs.prepare(maker, _image(name), TOKENS + 1, template=template)
        answer = record(folder, manifest, name, prompt, verdict.tokens, opened, template=template)
        outcome.answers.append(answer)
    return outcome


def _room(manifest: Manifest, prompt: Prompt) -> int:
    """New tokens that are compared: TOKENS, or as many as fit. Raises CapacityError for none."""
    counts = count_prompts(manifest, [read_at(manifest, prompt, None)], None, None)
    return min(TOKENS, counts.limits[0])


def _image(name: str) -> Image.Image:
    data = (resources.files("lvlm.assets") / name).read_bytes()
    return Image.open(io.BytesIO(data)).convert("RGB")


def _prompt_maker(folder: Path, manifest: Manifest) -> PromptMaker:
    return PromptMaker(
        Tokenizer(folder / "tokenizer.json", manifest.text.eos_ids),
        manifest.images,
        manifest.text.vocab,
        manifest.chat_template,
        manifest.special_tokens,
        manifest.capacity.max_images,
        manifest.generation,
    )


def _against_judge(
    plan: ExportPlan,
    folder: Path,
    manifest: Manifest,
    prompt: Prompt,
    verdict: Verdict,
    opened: Opened,
    outcome: ValidationOutcome,
) -> None:
    """The canonical graphs with nothing merged and nothing dropped, whatever the recipe."""
    form = canonical(manifest, widened=False)
    entries = len(prompt.ids) + len(verdict.tokens) + 1
    manifest = whole(manifest, entries)
    run = run_form(folder, form, manifest, prompt, verdict.tokens, opened, 1.0, pieces=True)
    outcome.ran(form, False)
    stored = plan.checkpoint.stored_dtype() or plan.dtype
    limit: float | None = TOLERANCE[plan.dtype]
    if stored.itemsize > plan.dtype.itemsize or plan.dtype != stored:
        limit = max(TOLERANCE[plan.dtype], ROUNDED_TOLERANCE.get(plan.dtype, 0.0))
    exact = limit
    if low_precision(plan):
        limit = None  # what it costs is told; what is right, the reference says
    outcome.checks.append(
        Check(
            "vision.onnx and transformers",
            model_inputs.features(run.features, verdict.features),
            exact,
            UNIT,
        )
    )
    apart = [difference(a, b.numpy()) for a, b in zip(run.logits, verdict.logits, strict=True)]
    outcome.checks.append(Check("prefill.onnx and transformers", apart[0], limit, UNIT))
    outcome.checks.append(Check("decode.onnx and transformers", max(apart), limit, UNIT))
    if run.extended:
        expected = verdict.logits[0 if plan.recipe.in_place else -1].numpy()
        largest = max(difference(x, expected) for x in run.extended)
        outcome.checks.append(Check("extend.onnx and transformers", largest, limit, UNIT))
    wrong = wrong_tokens(run.chosen, verdict.tokens, verdict.scores, limit or np.inf)
    name = f"tokens unlike transformers' generate, of {len(verdict.tokens)}"
    outcome.checks.append(Check(name, wrong, None if limit is None else 0, "tokens"))
