"""Running samples through one bundle: what the answer's tokens cost it, and what it answers.

Forced: the answer's tokens are fed one per decode step, as if the model had chosen them, so that
compression acts as in generation, and each is scored by the logits that preceded it. Greedy: the
model answers for itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from lvlm.calibration.datasets.evaluation_samples import PLACEHOLDER, DataError, EvaluationSample
from lvlm.calibration.evaluate.fit import SampleShape
from lvlm.calibration.evaluate.records import Run, SampleRecord
from lvlm.calibration.evaluate.variants import Bundle, Variant
from lvlm.core.errors import BundleError, LvlmError
from lvlm.runtime.generate.asks import Images, Question, one_ask
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.chat_template import Turn
from lvlm.runtime.prompt.prompts import Prompt, PromptMaker
from lvlm.runtime.prompt.text import Tokenizer


@dataclass(frozen=True)
class Conditions:
    """Conditions under which samples are run. ``batch`` prompts at a time, always the same ones
    together, so that a repetition meets the same rounding."""

    batch: int = 1
    max_new_tokens: int = 256
    device: str = "cpu"
    threads: int | None = None
    system: str | None = None


class BundleRunner:
    """A bundle that samples are run through. The graphs are loaded on entering its context."""

    def __init__(self, bundle: Bundle, how: Conditions) -> None:
        self.bundle, self.how = bundle, how
        manifest = bundle.manifest
        self._tokenizer = Tokenizer(bundle.folder / "tokenizer.json", manifest.text.eos_ids)
        self._maker = PromptMaker(
            self._tokenizer,
            manifest.images,
            manifest.text.vocab,
            manifest.chat_template,
            manifest.special_tokens,
            generation=manifest.generation,
        )
        self._options = GenerationOptions(
            chat_template=bool(manifest.chat_template), system=how.system
        )
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        model = Model(self.bundle.folder, device=self.how.device, threads=self.how.threads)
        self._model = self._closing.enter_context(model)
        return self

    def __exit__(self, *error: object) -> None:
        del self._model
        self._closing.close()

    def shape(self, sample: EvaluationSample) -> SampleShape:
        """Raises LvlmError, naming the sample, if it cannot be prepared for this model."""
        prompt = self._prompt(sample)
        counts = np.unique(prompt.image_id[prompt.image_id > 0], return_counts=True)[1]
        text_tokens = len(prompt.ids) - int(counts.sum())
        return SampleShape(text_tokens, tuple(counts.tolist()), tuple(self._answer(sample)))

    def _text(self, sample: EvaluationSample) -> str:
        """The prompt with this model's placeholders; without a chat template images that have
        no place in it come first."""
        image = self.bundle.manifest.images.token
        text = sample.prompt.replace(PLACEHOLDER, image)
        if not self._options.chat_template and image not in text:
            text = f"{image}\n" * len(sample.images) + text
        return text

    def _turns(self, sample: EvaluationSample) -> list[Turn]:
        """Its conversation, with the images in the first question."""
        turns: list[Turn] = []
        for question, answer in sample.before:
            turns += [Turn("user", question), Turn("assistant", answer)]
        turns.append(Turn("user", sample.prompt))
        turns[0] = replace(turns[0], images=len(sample.images))
        return turns

    def _asked(self, sample: EvaluationSample) -> tuple[Question, Images]:
        """A text and its images, or messages, which have them: the input of a model."""
        if not sample.before:
            return self._text(sample), sample.images
        first, *others = self._turns(sample)
        parts: list[dict[str, Any]] = [{"type": "image", "image": i} for i in sample.images]
        parts.append({"type": "text", "text": first.text})
        messages = [{"role": turn.role, "content": turn.text} for turn in others]
        return [{"role": first.role, "content": parts}, *messages], ()

    def _prompt(self, sample: EvaluationSample) -> Prompt:
        try:
            ask = one_ask(*self._asked(sample))
            return self._maker.prepare(0, ask.prompt, ask.images, self._options)
        except LvlmError as error:
            raise type(error)(f"{sample.where}: {error}") from None

    def _answer(self, sample: EvaluationSample) -> list[int]:
        template = self._maker.template
        if template is None:
            text = self._text(sample)
        elif sample.before:
            system = [] if self.how.system is None else [Turn("system", self.how.system)]
            text = template.render_turns([*system, *self._turns(sample)])
        else:
            text = template.render(self._text(sample), len(sample.images), self.how.system)
        ids = answer_ids(self._tokenizer, text, sample.answer)
        if not ids:
            raise DataError(f"{sample.where}: the answer has no tokens; give it text")
        if max(ids) >= self.bundle.manifest.text.vocab:
            raise BundleError(f"the tokenizer gives token {max(ids)}, which the model lacks")
        return ids

    def run(
        self,
        run: Run,
        variant: Variant,
        keep: float | None,
        samples: Sequence[EvaluationSample],
        shapes: Sequence[SampleShape],
        keys: Sequence[str],
    ) -> list[SampleRecord]:
        """The records of some samples, together in one batch; ``keep`` is the solved option, if
        the variant has one to solve."""
        asked = [self._asked(sample) for sample in samples]
        texts, images = [prompt for prompt, _ in asked], [given for _, given in asked]
        ratios = {"keep": variant.keep if keep is None else keep, "kv_keep": variant.kv_keep}
        options = GenerationOptions.of(self._options, ratios)
        if run == "forced":
            answers = [shape.answer for shape in shapes]
            found = self._model.score(texts, answers, images, options=options)
        else:
            max_new_tokens = self.how.max_new_tokens
            found = self._model.generate(
                texts, images, options=options, max_new_tokens=max_new_tokens
            )
        return [
            SampleRecord(
                key=key,
                sample=sample.id,
                # A reduction at the encoder's output shortens what Stats calls the prompt
                kept=float(np.mean(answer.stats.kept_per_layer)) / shape.prompt_tokens,
                keep=keep,
                nll=math.fsum(-s.logprob for s in answer.scores) if run == "forced" else None,
                text=self._decoded(answer.token_ids) if run == "greedy" else None,
                tokens=answer.stats.new_tokens,
                cache_bytes_used=answer.stats.cache_bytes_used,
                cache_bytes_allocated=answer.stats.cache_bytes_allocated // len(samples),
                vision_ms=answer.stats.vision_ms,
                prefill_ms=answer.stats.prefill_ms,
                decode_ms=answer.stats.decode_ms,
                decode_steps=answer.stats.decode_steps,
            )
            for answer, sample, shape, key in zip(found, samples, shapes, keys, strict=True)
        ]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens).strip()


def answer_ids(tokenizer: Tokenizer, prompt: str, answer: str) -> list[int]:
    """Token ids of an answer as it follows its prompt, without special tokens.

    Where a prompt does not end in white space, a space comes before the answer: so chat models were
    trained, and SentencePiece puts one there by itself.
    """
    answer = answer.strip()
    space = "" if prompt[-1:].isspace() else " "
    head = tokenizer.encode(prompt, add_special_tokens=False)
    both = tokenizer.encode(prompt + space + answer, add_special_tokens=False)
    # Where a token spans the border, the answer stands alone
    alone = both[: len(head)] != head
    return tokenizer.encode(answer, add_special_tokens=False) if alone else both[len(head) :]
