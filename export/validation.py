"""Does the bundle compute what the checkpoint computes? Figures per graph, then tokens.

A real picture goes through the bundle on ONNX Runtime and through the torch reference in fp32.
Where the bundle's weights or cache are narrower on purpose, so are the reference's: whether the
export is right is one question, what the rounding costs another, which is answered beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lvlm.export.progress import Progress
from lvlm.export.quantization import round_products
from lvlm.export.reference import Answer, Reference, load_fp32
from lvlm.runtime.batch import Batch
from lvlm.runtime.errors import LvlmError, ValidationError
from lvlm.runtime.generation_options import GenerationOptions
from lvlm.runtime.model import Model
from lvlm.runtime.prompts import Prompt

if TYPE_CHECKING:
    from lvlm.export.families._base import Family
    from lvlm.export.plan import Plan

PICTURE, QUESTION, TOKENS = "samples/digits-1.png", "Describe the picture.", 24
# Largest |difference| over the largest |reference|, by the dtype that was run.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2}
# MatMulNBits rounds what it multiplies int4 and int8 weights with to 8 bits.
QUANTIZED_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Check:
    """One comparison: ``figure`` must not exceed ``limit``; None: it is only told."""

    name: str
    figure: float
    limit: float | None
    unit: str

    @property
    def passed(self) -> bool:
        return self.limit is None or self.figure <= self.limit


def validate(plan: Plan, folder: Path) -> list[Check]:
    """All checks of a finished bundle in ``folder``; ValidationError with the table if one fails.

    A bf16 bundle, which the CPU cannot run, is checked through a twin in fp32 whose weights are
    rounded to bf16.
    """
    if plan.dtype == torch.bfloat16:
        from lvlm.export.exporter import write_bundle

        with tempfile.TemporaryDirectory(dir=folder, prefix=".twin-") as name:
            options = replace(plan.options, dtype="fp32", rounding=torch.bfloat16, targets=())
            twin = replace(plan, options=options, dtype=torch.float32, cache_dtype=torch.float32)
            write_bundle(twin, Path(name), Progress(0, quiet=True))
            checks = _compare(twin, Path(name))
    else:
        checks = _compare(plan, folder)
    if not all(check.passed for check in checks):
        raise ValidationError(
            "the bundle does not compute what the checkpoint computes; nothing was written",
            table(checks),
        )
    return checks


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


def _compare(plan: Plan, folder: Path) -> list[Check]:
    how, limit = plan.options.quantization, TOLERANCE[plan.dtype]
    limit = limit if how is None else max(limit, QUANTIZED_TOLERANCE)
    rounding = plan.options.rounding or plan.dtype
    torch_model = load_fp32(plan.family, plan.config, plan.checkpoint, plan.stored_names, rounding)
    reference = Reference(plan.family, plan.config, torch_model, plan.recipe)
    narrow = how is not None or plan.cache_dtype != plan.dtype

    def relative(name: str, ours: np.ndarray, theirs: np.ndarray) -> Check:
        figure = _difference(ours, theirs)
        return Check(name, figure if np.isfinite(figure) else np.inf, limit, "of the largest value")

    picture = (resources.files("lvlm.assets") / PICTURE).read_bytes()
    with Model(folder, verify="none") as model:
        prompt = _prompt(model, picture, _token_count(plan))
        features = reference.encode(prompt.pictures)
        batch = model.batches.start([prompt])
        answer = original = reference.generate(
            prompt, features, max_new_tokens=prompt.max_new_tokens
        )
        if narrow:
            cache = torch.float32 if plan.cache_dtype == plan.dtype else plan.cache_dtype
            reference = Reference(plan.family, plan.config, torch_model, plan.recipe, cache)
            if how is not None:
                round_products(reference.language, how, plan.dtype)
            answer = reference.generate(
                prompt,
                features,
                max_new_tokens=prompt.max_new_tokens,
                forced=original.tokens,
            )
        checks = [
            relative(
                "vision.onnx  image features", np.concatenate(batch.features), features.numpy()
            ),
            relative("prefill.onnx logits", batch.logits[0], answer.logits[0].numpy()),
        ]
        layers = range(model.manifest.text.layers)
        caches = [batch.cache.buffers[f"{x}_{i}"] for i in layers for x in ("key", "value")]
        checks.append(
            max(
                (
                    relative("prefill.onnx cache", ours[:, :, : theirs.shape[2]], theirs.numpy())
                    for ours, theirs in zip(caches, answer.caches, strict=True)
                ),
                key=lambda check: check.figure,
            )
        )
        tokens, decode = _decode(batch, answer.tokens, [x.numpy() for x in answer.logits], relative)
    checks.append(decode)
    best = [int(scores.argmax()) for scores in answer.logits]
    wrong = _wrong_tokens(tokens, best, answer.logits, limit)
    checks.append(Check(f"tokens that differ, of {len(answer.tokens)}", wrong, 0, "tokens"))
    if narrow:
        checks += _cost(original, answer)
    elif plan.recipe.name == "none" and rounding == torch.float32:
        theirs = _transformers_tokens(plan.family, torch_model, prompt, len(answer.tokens))
        wrong = sum(a != b for a, b in zip(tokens, theirs, strict=False))
        checks.append(Check("tokens unlike transformers' generate", wrong, 0, "tokens"))
    return checks


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest |difference| over the largest |theirs|."""
    difference = np.abs(ours.astype(np.float64) - theirs).max()
    return float(difference / max(float(np.abs(theirs).max()), 1e-6))


def _cost(original: Answer, rounded: Answer) -> list[Check]:
    """What narrower weights and caches change against the checkpoint, on the same tokens."""
    pairs = list(zip(rounded.logits, original.logits, strict=True))
    largest = max(_difference(a.numpy(), b.numpy()) for a, b in pairs)
    changed = sum(int(a.argmax()) != int(b.argmax()) for a, b in pairs)
    return [
        Check("rounding: change of the logits", largest, None, "of the largest value"),
        Check(f"rounding: tokens that change, of {len(pairs)}", changed, None, "tokens"),
    ]


def _token_count(plan: Plan) -> int:
    """Enough for compact.onnx to run once, where there is one."""
    rule = plan.recipe.cache_rule()
    interval = rule.compression.interval if rule else None
    return max(TOKENS, (interval or 0) + 4)


def _prompt(model: Model, picture: bytes, tokens: int) -> Prompt:
    options = GenerationOptions(max_new_tokens=tokens)
    try:
        return model.prepare(0, QUESTION, [picture], options)
    except LvlmError:
        # A checkpoint without a chat template: the bare question after the picture.
        text = f"{model.manifest.images.token}\n{QUESTION}"
        return model.prepare(0, text, [picture], replace(options, chat_template=False))


def _decode(
    batch: Batch,
    forced: Sequence[int],
    logits: Sequence[np.ndarray],
    relative: Callable[[str, np.ndarray, np.ndarray], Check],
) -> tuple[list[int], Check]:
    """Follow the reference's tokens; what the bundle would have chosen, and the worst logits."""
    chosen, worst = [], Check("decode.onnx  logits", 0.0, np.inf, "")
    row = batch.rows[0]
    for step, token in enumerate(forced):
        check = relative("decode.onnx  logits", batch.logits[0], logits[step])
        worst = max(worst, check, key=lambda c: c.figure)
        chosen.append(int(batch.logits[0].argmax()))
        row.tokens.append(token)
        if step + 1 < len(forced):
            batch.decode_step()
    return chosen, worst


def _wrong_tokens(
    ours: Sequence[int], theirs: Sequence[int], logits: Sequence[torch.Tensor], limit: float
) -> int:
    """Tokens that differ though the reference was not undecided between the two."""
    wrong = 0
    for a, b, scores in zip(ours, theirs, logits, strict=True):
        gap = float(scores[b] - scores[a])
        wrong += a != b and gap > limit * float(scores.abs().max())
    return wrong


def _transformers_tokens(
    family: Family, model: torch.nn.Module, prompt: Prompt, count: int
) -> list[int]:
    ids = torch.tensor([list(prompt.ids)])
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **family.transformers_inputs(prompt),
            max_new_tokens=count,
            do_sample=False,
        )
    return [int(t) for t in out[0, ids.shape[1] :]]
