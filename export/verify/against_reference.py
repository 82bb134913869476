"""A bundle's recipe on every form of its graphs, against the torch reference of the recipe."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lvlm.export.recipes.parts.cache_rule import CacheRule
from lvlm.export.recipes.recipe import WithCache
from lvlm.export.reference.torch_reference import Reference, ReferenceAnswer, load_fp32
from lvlm.export.verify import model_inputs
from lvlm.export.verify.checks import TOLERANCE, UNIT, Check, difference, wrong_tokens
from lvlm.export.verify.graph_forms import CANONICAL, GraphForm, Opened, forms_of
from lvlm.export.verify.judge import MIN_STEPS
from lvlm.export.verify.outcome import ValidationOutcome
from lvlm.export.verify.run import Run, run_form
from lvlm.export.weights.packed_linears import exchange_linears
from lvlm.export.weights.quantization import linear_weights, round_linears
from lvlm.export.weights.stored_weights import StoredLinear
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.policies.policy import CachePolicy
from lvlm.runtime.prompt.prompts import Prompt

if TYPE_CHECKING:
    from lvlm.export.export_plan import ExportPlan

FEW = 4  # steps of forms that are slow here
KEEP = 0.5  # of the cache, where a bundle keeps all of it unless a call asks for less
INTERVAL = 2  # steps between runs of compact.onnx, so that few tokens are enough for one
# MatMulNBits rounds what it multiplies int4 and int8 weights with to 8 bits.
QUANTIZED_TOLERANCE = 5e-2
# Pieces of a prompt read keys and values in 8 bits, prefill those that were not rounded
PIECES_IN_8_BITS = 1e-1
NEAR_TIES = "compared in fp32 alone; fp16 ranks near ties in another order"


def low_precision(plan: ExportPlan) -> bool:
    """Weights or cache are of lower precision than is computed in, on purpose."""
    return plan.options.quantization is not None or plan.cache_dtype != plan.dtype


def chooses(manifest: Manifest) -> bool:
    """The recipe ranks tokens or entries, and what it keeps depends on these ranks."""
    return bool(manifest.shortenings) or manifest.cache_policy is not None


def against_reference(
    plan: ExportPlan,
    folder: Path,
    manifest: Manifest,
    prompt: Prompt,
    steps: int,
    opened: Opened,
) -> ValidationOutcome:
    """Every form that can be run here, with the recipe as exported, for ``steps`` tokens; half of
    the cache where all of it stays."""
    outcome, steps = ValidationOutcome(), max(MIN_STEPS, steps)
    recipe, rule = plan.recipe, plan.recipe.cache_rule()
    if rule is not None:
        recipe = WithCache(recipe, CacheRule(_shown(rule.cache_policy)))
        if rule.cache_policy.budget.keep == 1 and rule.cache_policy.budget.cap is None:
            outcome.notes.append(f"compared at kv_keep {KEEP}: as exported all of the cache stays")
    if manifest.cache_policy is not None:
        manifest = replace(manifest, cache_policy=_shown(manifest.cache_policy))
    how = plan.options.quantization
    model = load_fp32(plan.family, plan.config, plan.checkpoint, plan.stored_names, plan.dtype)
    if how is not None and any(isinstance(m, StoredLinear) for m in model.modules()):
        # What stays in its file is quantized anew whenever it is read
        steps = min(steps, MIN_STEPS)
    reference = Reference(plan.family, plan.config, model, recipe)
    prompt = reference.read_at(prompt)
    features = reference.encode(prompt.images)
    answer = original = reference.generate(prompt, features, max_new_tokens=steps)
    if low_precision(plan):
        cache = torch.float32 if plan.cache_dtype == plan.dtype else plan.cache_dtype
        reference = Reference(plan.family, plan.config, model, recipe, cache)
        _round(plan, reference)
        answer = reference.generate(prompt, features, max_new_tokens=steps, forced=original.tokens)
    del model, reference
    gc.collect()
    choosing = chooses(manifest)
    for form in forms_of(manifest):
        if not form.reason:
            whole_answer = form.name in (CANONICAL, "ort-cpu") and not form.rounds
            fed = answer.tokens if whole_answer else answer.tokens[:FEW]
            run = run_form(folder, form, manifest, prompt, fed, opened, pieces=True)
            caches = not (form.rounds and choosing)
            limits = _limit(plan, form), _held_limit(plan, form)
            outcome.checks += _compare_form(form, run, answer, features, limits, caches)
            outcome.checks += pieces_checks(plan, form, run)
            outcome.ran(form, run.compacted)
            if not caches:
                outcome.notes.append(f"cache of {form.files['prefill']}: {NEAR_TIES}")
        else:
            outcome.ran(form, False)
    if low_precision(plan):
        outcome.checks += _cost(original, answer)
    return outcome


def _shown(policy: CachePolicy) -> CachePolicy:
    """The policy so that few tokens show its compression."""
    return policy.at_most_every(INTERVAL).keeping_less(KEEP)


def _round(plan: ExportPlan, reference: Reference) -> None:
    """Give the reference's model the weights that the bundle has, where they are quantized."""
    if plan.calibrated is not None:
        tensors, names = plan.calibrated.tensors, plan.stored_names
        packed = {
            name: tensors[names[name]]
            for name in linear_weights(reference.model, reference.language)
        }
        exchange_linears(reference.model, reference.language, packed)
    elif (how := plan.options.quantization) is not None:
        round_linears(reference.language, how, plan.dtype)


def _limit(plan: ExportPlan, form: GraphForm) -> float:
    found = TOLERANCE[torch.float32 if form.widened else plan.dtype]
    exact = plan.quantization is None or form.name == CANONICAL
    return found if exact else max(found, QUANTIZED_TOLERANCE)


def _held_limit(plan: ExportPlan, form: GraphForm) -> float:
    """The limit for what is read of the cache: in 8 bits a number may be rounded the other way."""
    found = _limit(plan, form)
    return max(found, TOLERANCE[torch.int8]) if plan.cache_dtype == torch.int8 else found


def _compare_form(
    form: GraphForm,
    run: Run,
    answer: ReferenceAnswer,
    features: torch.Tensor,
    limits: tuple[float, float],
    caches: bool,
) -> list[Check]:
    """``limits``: of what comes before the cache, and of what is read of it."""
    how, (limit, held) = ", in fp16" if form.rounds else "", limits
    logits = [x.numpy() for x in answer.logits]
    apart = [difference(a, b) for a, b in zip(run.logits, logits, strict=False)]
    best = [int(scores.argmax()) for scores in answer.logits[: len(run.logits)]]
    own = [int(scores.argmax()) for scores in run.logits]
    wrong = wrong_tokens(own, best, answer.logits, held)
    shown = [
        ("prefill", "logits", apart[0], limit, UNIT),
        ("decode", "logits", max(apart), held, UNIT),
        ("decode", f"tokens that differ, of {len(own)}", wrong, 0, "tokens"),
    ]
    if caches:
        pairs = zip(run.caches, answer.caches, strict=True)
        largest = max(difference(ours, theirs.numpy()) for ours, theirs in pairs)
        shown.insert(1, ("prefill", "cache", largest, held, UNIT))
    vision = model_inputs.features(run.features, features)
    shown.insert(0, ("vision", "image features", vision, limit, UNIT))
    return [
        Check(f"{form.files[graph]} {what}{how}", figure, bound, of)
        for graph, what, figure, bound, of in shown
        if form.name == CANONICAL or form.files[graph] != f"{graph}.onnx"
    ]


def pieces_checks(plan: ExportPlan, form: GraphForm, run: Run) -> list[Check]:
    """The prompt's logits, read in pieces, against those of the same form's prefill, or the
    answer's, read at once, against those of its decode. Of a low-precision cache pieces read
    what was rounded, prefill what was not."""
    file = form.files.get("extend")
    if not run.extended or (form.name != CANONICAL and file == "extend.onnx"):
        return []
    limit = _limit(plan, form)
    if plan.cache_dtype != plan.dtype:
        in_8_bits = plan.recipe.in_place and plan.cache_dtype == torch.int8
        limit = max(limit, PIECES_IN_8_BITS if in_8_bits else TOLERANCE[plan.cache_dtype])
    expected = run.logits[0 if plan.recipe.in_place else -1]
    largest = max(difference(logits, expected) for logits in run.extended)
    how = ", in fp16" if form.rounds else ""
    return [Check(f"{file} logits, extended{how}", largest, limit, UNIT)]


def _cost(original: ReferenceAnswer, rounded: ReferenceAnswer) -> list[Check]:
    """The loss by low-precision weights and caches against the checkpoint, on the same tokens."""
    pairs = list(zip(rounded.logits, original.logits, strict=True))
    largest = max(difference(a.numpy(), b.numpy()) for a, b in pairs)
    changed = sum(int(a.argmax()) != int(b.argmax()) for a, b in pairs)
    return [
        Check("rounding: change of the logits", largest, None, UNIT),
        Check(f"rounding: tokens that change, of {len(pairs)}", changed, None, "tokens"),
    ]
