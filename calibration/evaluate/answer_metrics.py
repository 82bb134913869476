"""Metrics of a bundle's answers, as the papers define them (arXiv 2407.18121, 2412.03409).

A metric is found by its name in ``METRICS``. Each gives every sample a sum and a weight; its value
over samples is made of the weighted mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any, ClassVar, NamedTuple

from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
from lvlm.calibration.evaluate.records import Run, SampleRecord


class Score(NamedTuple):
    """Score of one sample; scores are added up before they are divided."""

    total: float
    weight: float


class AnswerMetric:
    """``run`` says which run it is taken from, ``against_full`` whether it needs the text that the
    full cache gives."""

    name: ClassVar[str]
    title: ClassVar[str]
    meaning: ClassVar[str]
    run: ClassVar[Run]
    against_full: ClassVar[bool] = False
    style: ClassVar[str] = ".4f"

    def score(self, sample: EvaluationSample, record: SampleRecord, full: str | None) -> Score:
        """``full`` is the full cache's greedy text, if ``against_full``."""
        raise NotImplementedError

    def value(self, scores: Iterable[Score]) -> float:
        """Value over samples; of one sample, its own."""
        totals, weights = zip(*scores, strict=True)
        return math.fsum(totals) / math.fsum(weights)


class Perplexity(AnswerMetric):
    """exp of the mean negative log-likelihood over all answer tokens of all samples."""

    name: ClassVar[str] = "ppl"
    title: ClassVar[str] = "perplexity"
    meaning: ClassVar[str] = (
        "exp of the mean negative log-likelihood over all tokens of all answers, which are fed one "
        "by one through the cache"
    )
    run: ClassVar[Run] = "forced"

    def score(self, sample: EvaluationSample, record: SampleRecord, full: str | None) -> Score:  # noqa: ARG002
        assert record.nll is not None
        return Score(record.nll, record.tokens)

    def value(self, scores: Iterable[Score]) -> float:
        return math.exp(min(700.0, super().value(scores)))  # what a float and JSON can hold


class RougeL(AnswerMetric):
    """ROUGE-L F1, mean over samples, against the full cache's text, not the data set's answer."""

    name: ClassVar[str] = "rouge"
    title: ClassVar[str] = "ROUGE-L"
    meaning: ClassVar[str] = (
        "F1 of the greedy text against the full cache's greedy text, mean over samples"
    )
    run: ClassVar[Run] = "greedy"
    against_full: ClassVar[bool] = True

    def score(self, sample: EvaluationSample, record: SampleRecord, full: str | None) -> Score:  # noqa: ARG002
        assert record.text is not None
        assert full is not None
        return Score(rouge_l(full, record.text), 1)


class Accuracy(AnswerMetric):
    """Share of greedy texts that equal the answer but for case, spaces and a final full stop."""

    name: ClassVar[str] = "accuracy"
    title: ClassVar[str] = "exact match"
    meaning: ClassVar[str] = (
        "share of greedy texts equal to the answer, but for case, spaces and a final full stop"
    )
    run: ClassVar[Run] = "greedy"

    def score(self, sample: EvaluationSample, record: SampleRecord, full: str | None) -> Score:  # noqa: ARG002
        assert record.text is not None
        return Score(float(normalised(record.text) == normalised(sample.answer)), 1)


METRICS: dict[str, AnswerMetric] = {m.name: m for m in (Perplexity(), RougeL(), Accuracy())}


def rouge_l(target: str, text: str) -> float:
    """F1 of the longest common subsequence of stemmed words, 0 to 1; equal texts have 1, also
    where the scorer, which knows Latin letters and digits only, sees no word in them."""
    if target.strip() == text.strip():
        return 1.0
    return float(_scorer().score(target, text)["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def normalised(text: str) -> str:
    """Text for exact matches: spaces collapsed, case folded, one final full stop removed."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()
