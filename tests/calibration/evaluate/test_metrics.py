"""Perplexity, ROUGE-L and exact matches by the papers' definitions, on values known by hand."""

from __future__ import annotations

import math

import pytest

from lvlm.calibration.datasets.evaluation_samples import EvaluationSample
from lvlm.calibration.evaluate.answer_metrics import METRICS, normalised, rouge_l
from lvlm.calibration.evaluate.records import SampleRecord

SAMPLE = EvaluationSample("1", (), "Which animal?", "A cat.", "here")


def record(**fields: object) -> SampleRecord:
    return SampleRecord("key", "1", **fields)  # type: ignore[arg-type]


def test_perplexity_weighs_tokens_not_samples() -> None:
    ppl = METRICS["ppl"]
    scores = [ppl.score(SAMPLE, record(nll=n, tokens=t), None) for n, t in ((2.0, 1), (1.0, 9))]
    assert ppl.value(scores) == pytest.approx(math.exp(3 / 10))
    assert ppl.value(scores[:1]) == pytest.approx(math.exp(2))
    assert ppl.value([ppl.score(SAMPLE, record(nll=1e9, tokens=1), None)]) < math.inf


@pytest.mark.parametrize(
    ("target", "text", "expected"),
    [
        ("the cat sat on the mat", "the cat lay on the mat", 5 / 6),
        ("a b c d", "d c b a", 1 / 4),
        ("a b c d", "a b", 2 * 1 * 0.5 / 1.5),
        ("The cats are sitting.", "the cat ARE sit", 1.0),  # stemmed, without case
        ("one two", "three four", 0.0),
        ("one two", "", 0.0),
        ("", "", 1.0),
        ("两只猫。", "两只猫。 ", 1.0),
    ],
)
def test_rouge_l(target: str, text: str, expected: float) -> None:
    assert rouge_l(target, text) == pytest.approx(expected)


def test_rouge_compares_with_the_full_cache_and_takes_the_mean_over_samples() -> None:
    rouge = METRICS["rouge"]
    scores = [rouge.score(SAMPLE, record(text=t), "a b c d") for t in ("a b c d", "d c b a")]
    assert rouge.against_full
    assert rouge.value(scores) == pytest.approx((1 + 0.25) / 2)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("a cat", True),
        ("  A \n CAT.", True),
        ("a cat .", True),
        ("a cat..", False),
        ("a cat!", False),
        ("acat", False),
        ("a cat. It sleeps.", False),
    ],
)
def test_exact_match_forgives_case_spaces_and_one_full_stop(text: str, same: bool) -> None:
    accuracy = METRICS["accuracy"]
    assert accuracy.value([accuracy.score(SAMPLE, record(text=text), None)]) == float(same)


def test_numbers_keep_their_points() -> None:
    assert normalised("3.5") != normalised("35")
    assert normalised("3.5.") == "3.5"
