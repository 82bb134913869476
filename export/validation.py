"""Does the bundle compute what the checkpoint computes? transformers' own loading is the judge.

First what goes into the model (pixels, chat template, token ids, end of text), then the canonical
graphs with nothing merged or dropped against transformers' generate, then every form of the graphs
that can be run here, with the recipe as exported, against the recipe's torch reference. Where the
bundle's weights or cache are narrower on purpose, so are the reference's: whether the export is
right is one question, what the rounding costs another, which is answered beside it.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from lvlm.export.quantization import round_products
from lvlm.export.reference import Answer, Reference, load_fp32
from lvlm.export.verify import prompts
from lvlm.export.verify.checks import Check, difference
from lvlm.export.verify.forms import CANONICAL, Form, Opened, canonical, forms_of
from lvlm.export.verify.judge import LEAST, Judge, Verdict
from lvlm.export.verify.run import Run, run_form, soon, whole
from lvlm.runtime.bundle import Manifest, read_bundle
from lvlm.runtime.errors import LvlmError, ValidationError
from lvlm.runtime.prompts import Prompt, PromptMaker
from lvlm.runtime.text import Tokenizer

if TYPE_CHECKING:
    from lvlm.export.plan import Plan

PICTURE, TOKENS, FEW = "samples/digits-1.png", 24, 4
INTERVAL = 2  # steps between runs of compact.onnx, so that few tokens are enough for one
# Largest |difference| over the largest |reference|, by the dtype that was run.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
# MatMulNBits rounds what it multiplies int4 and int8 weights with to 8 bits.
QUANTIZED_TOLERANCE = 5e-2
NEAR_TIES = "compared in fp32 alone; fp16 ranks near ties in another order"
# Of weights that are stored wider than the bundle has them: bf16 has 8 bits.
ROUNDED_TOLERANCE = {torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass
class Outcome:
    """The comparisons; ``files``: what was run of the bundle's graphs, by file, and of the rest why
    not; ``estimate``: how many tokens were compared and why."""

    checks: list[Check] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    estimate: str = ""

    def check(self) -> None:
        """ValidationError, with the table, where a comparison failed."""
        failed = [check.name for check in self.checks if not check.passed]
        if not failed:
            return
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        error = ValidationError(
            f"the bundle does not compute what the checkpoint computes (✗ {failed[0]}{more})"
        )
        error.details = table(self.checks)
        raise error


def validate(plan: Plan, folder: Path, tell: Callable[[str], None] = lambda _: None) -> Outcome:
    """All checks of a finished bundle; ValidationError with the table if one fails."""
    manifest, outcome = read_bundle(folder, "none"), Outcome()
    judge = Judge(plan.checkpoint.folder)
    judge.load_model(plan.checkpoint.stored_dtype() or plan.dtype)
    maker = _prompt_maker(folder, manifest)
    data = (resources.files("lvlm.assets") / PICTURE).read_bytes()
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    outcome.checks.append(prompts.eos(judge, manifest.text.eos_ids))
    try:
        prompt = prompts.prepare(maker, picture, TOKENS + 1)
    except LvlmError as error:
        outcome.checks += prompts.texts(judge, maker)
        outcome.check()
        raise ValidationError(f"the bundle takes no prompt with a picture: {error}") from None
    resized = manifest.images.tokens < plan.family.images(plan.config, judge.folder).tokens
    if resized:
        outcome.notes.append("pixels: not compared, --max-image-tokens scales pictures down")
    outcome.checks += prompts.compare(judge, plan.family, maker, picture, prompt, not resized)
    if judge.without:
        outcome.notes.append(f"tokens around pictures: not compared, {judge.without}")
    outcome.check()  # nothing else can be right
    pixels = plan.family.transformers_inputs(prompt) if resized else judge.pixels(picture)
    verdict = judge.answer(prompt.ids, pixels, {judge.image_id}, TOKENS, tell)
    outcome.estimate = verdict.estimate
    del judge
    gc.collect()
    opened: Opened = {}
    _against_judge(plan, folder, manifest, prompt, verdict, opened, outcome)
    outcome.check()
    _against_reference(plan, folder, manifest, prompt, len(verdict.logits), opened, outcome)
    outcome.check()
    return outcome


def table(checks: Sequence[Check]) -> str:
    width = max(len(c.name) for c in checks)
    return "\n".join(
        f"  {_mark(c)} {c.name:{width}}  {c.figure:.3g} {c.unit}"
        + ("" if c.limit is None else f" (limit {c.limit:.3g})")
        for c in checks
    )


def _mark(check: Check) -> str:
    if check.limit is None:
        return "·"
    return "✓" if check.passed else "✗"


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


def _narrow(plan: Plan) -> bool:
    return plan.options.quantization is not None or plan.cache_dtype != plan.dtype


def _against_judge(
    plan: Plan,
    folder: Path,
    manifest: Manifest,
    prompt: Prompt,
    verdict: Verdict,
    opened: Opened,
    outcome: Outcome,
) -> None:
    """The canonical graphs with nothing merged and nothing dropped, whatever the recipe."""
    form = canonical(manifest, widened=False)
    entries = len(prompt.ids) + len(verdict.tokens) + 1
    run = _run(folder, form, whole(manifest, entries), prompt, verdict.tokens, opened, 1.0)
    _note_files(outcome, form, False)
    stored = plan.checkpoint.stored_dtype() or plan.dtype
    limit: float | None = TOLERANCE[plan.dtype]
    if stored.itemsize > plan.dtype.itemsize or plan.dtype != stored:
        limit = max(TOLERANCE[plan.dtype], ROUNDED_TOLERANCE.get(plan.dtype, 0.0))
    exact = limit
    if _narrow(plan):
        limit = None  # what it costs is told; what is right, the reference says
    unit = "of the largest value"
    outcome.checks.append(
        Check(
            "vision.onnx and transformers",
            prompts.features(run.features, verdict.features),
            exact,
            unit,
        )
    )
    apart = [difference(a, b.numpy()) for a, b in zip(run.logits, verdict.logits, strict=True)]
    outcome.checks.append(Check("prefill.onnx and transformers", apart[0], limit, unit))
    outcome.checks.append(Check("decode.onnx and transformers", max(apart), limit, unit))
    wrong = _wrong_tokens(run.chosen, verdict.tokens, verdict.scores, limit or np.inf)
    name = f"tokens unlike transformers' generate, of {len(verdict.tokens)}"
    outcome.checks.append(Check(name, wrong, None if limit is None else 0, "tokens"))


def _against_reference(
    plan: Plan,
    folder: Path,
    manifest: Manifest,
    prompt: Prompt,
    steps: int,
    opened: Opened,
    outcome: Outcome,
) -> None:
    """Every form that can be run here, with the recipe as exported."""
    steps = max(LEAST, steps)
    recipe, rule = plan.recipe, plan.recipe.cache_rule()
    if rule is not None and (rule.compression.interval or 0) > INTERVAL:
        recipe = replace(recipe, kv_interval=INTERVAL)  # type: ignore[call-arg]
    manifest = soon(manifest, INTERVAL)
    how = plan.options.quantization
    model = load_fp32(plan.family, plan.config, plan.checkpoint, plan.stored_names, plan.dtype)
    reference = Reference(plan.family, plan.config, model, recipe)
    features = reference.encode(prompt.pictures)
    answer = original = reference.generate(prompt, features, max_new_tokens=steps)
    if _narrow(plan):
        cache = torch.float32 if plan.cache_dtype == plan.dtype else plan.cache_dtype
        reference = Reference(plan.family, plan.config, model, recipe, cache)
        if how is not None:
            round_products(reference.language, how, plan.dtype)
        answer = reference.generate(prompt, features, max_new_tokens=steps, forced=original.tokens)
    del model, reference
    gc.collect()
    chooses = rule is not None or bool(manifest.reductions)
    for form in forms_of(manifest):
        if not form.reason:
            whole_answer = form.name in (CANONICAL, "ort-cpu") and not form.rounds
            fed = answer.tokens if whole_answer else answer.tokens[:FEW]
            run = _run(folder, form, manifest, prompt, fed, opened)
            caches = not (form.rounds and chooses)
            outcome.checks += _compare_form(form, run, answer, features, _limit(plan, form), caches)
            _note_files(outcome, form, run.compacted)
            if not caches:
                outcome.notes.append(f"cache of {form.files['prefill']}: {NEAR_TIES}")
        else:
            _note_files(outcome, form, False)
    if _narrow(plan):
        outcome.checks += _cost(original, answer)


def _limit(plan: Plan, form: Form) -> float:
    found = TOLERANCE[torch.float32 if form.widened else plan.dtype]
    exact = plan.options.quantization is None or form.name == CANONICAL
    return found if exact else max(found, QUANTIZED_TOLERANCE)


def _run(
    folder: Path,
    form: Form,
    manifest: Manifest,
    prompt: Prompt,
    tokens: Sequence[int],
    opened: Opened,
    ratio: float | None = None,
) -> Run:
    try:
        return run_form(folder, form, manifest, prompt, tokens, opened, ratio)
    except LvlmError as error:
        raise ValidationError(f"the bundle's graphs ({form.name}) cannot be run: {error}") from None


def _compare_form(
    form: Form, run: Run, answer: Answer, features: torch.Tensor, limit: float, caches: bool
) -> list[Check]:
    unit, how = "of the largest value", ", in fp16" if form.rounds else ""
    logits = [x.numpy() for x in answer.logits]
    apart = [difference(a, b) for a, b in zip(run.logits, logits, strict=False)]
    best = [int(scores.argmax()) for scores in answer.logits[: len(run.logits)]]
    own = [int(scores.argmax()) for scores in run.logits]
    wrong = _wrong_tokens(own, best, answer.logits, limit)
    shown = [
        ("prefill", "logits", apart[0], limit, unit),
        ("decode", "logits", max(apart), limit, unit),
        ("decode", f"tokens that differ, of {len(own)}", wrong, 0, "tokens"),
    ]
    if caches:
        pairs = zip(run.caches, answer.caches, strict=True)
        most = max(difference(ours, theirs.numpy()) for ours, theirs in pairs)
        shown.insert(1, ("prefill", "cache", most, limit, unit))
    vision = prompts.features(run.features, features)
    shown.insert(0, ("vision", "image features", vision, limit, unit))
    return [
        Check(f"{form.files[graph]} {what}{how}", figure, at_most, of)
        for graph, what, figure, at_most, of in shown
        if form.name == CANONICAL or form.files[graph] != f"{graph}.onnx"
    ]


def _note_files(outcome: Outcome, form: Form, compacted: bool) -> None:
    for graph, file in form.files.items():
        said = f"not run: {form.reason}" if form.reason else "run"
        if graph == "compact" and not compacted and not form.reason:
            said = "loaded, not run: fewer tokens than an interval"
        elif form.how and not form.reason:
            said = f"run, {form.how}"
        before = outcome.files.get(file, "")
        if not before.startswith("run"):
            outcome.files[file] = said
        elif said.startswith("run") and len(said) != len(before) and "as it is" not in before:
            outcome.files[file] = f"{max(said, before, key=len)}, and as it is"


def _cost(original: Answer, rounded: Answer) -> list[Check]:
    """What narrower weights and caches change against the checkpoint, on the same tokens."""
    pairs = list(zip(rounded.logits, original.logits, strict=True))
    largest = max(difference(a.numpy(), b.numpy()) for a, b in pairs)
    changed = sum(int(a.argmax()) != int(b.argmax()) for a, b in pairs)
    return [
        Check("rounding: change of the logits", largest, None, "of the largest value"),
        Check(f"rounding: tokens that change, of {len(pairs)}", changed, None, "tokens"),
    ]


def _wrong_tokens(
    ours: Sequence[int], theirs: Sequence[int], scores: Sequence[torch.Tensor], limit: float
) -> int:
    """Tokens that differ though the judge was not undecided between the two."""
    wrong = 0
    for a, b, of in zip(ours, theirs, scores, strict=False):
        finite = of[torch.isfinite(of)]
        gap = float(of[b] - of[a])
        wrong += a != b and gap > limit * float(finite.abs().max())
    return wrong
