"""Figures of the evaluation against transformers' own and generate's."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from bundles import transformers_inputs
from evaluation_tools import HOW, IMAGE_TOKENS, perplexity, records
from settings import SHIPPED
from transformers import AutoModelForImageTextToText, AutoTokenizer

from lvlm.calibration.datasets.evaluation_samples import EvaluationSample, read_samples
from lvlm.calibration.evaluate.variant_runner import BundleRunner, answer_ids
from lvlm.calibration.evaluate.variants import Bundle, Variant
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.text import Tokenizer


@pytest.mark.parametrize("batch", [1, 2])
def test_perplexity_equals_that_of_transformers(
    full: Bundle, samples: list[EvaluationSample], tmp_path: Path, batch: int
) -> None:
    """One forward over prompt and answer, prepared by transformers' own tokenizer and template."""
    folder = SHIPPED
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses: list[float] = []
    with Model(full.folder) as model:
        for sample in samples:
            prepared = model.prepare(0, sample.prompt, sample.images, GenerationOptions())
            content = [{"type": "image"}, {"type": "text", "text": sample.prompt}]
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            ).replace("<image>", "<image>" * IMAGE_TOKENS)
            prompt = tokenizer(text)["input_ids"]
            both = torch.tensor([tokenizer(f"{text} {sample.answer}")["input_ids"]])
            with torch.no_grad():
                logits = theirs(input_ids=both, **transformers_inputs(folder, prepared)).logits[0]
            chosen = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
            losses += (-chosen.gather(1, both[0, len(prompt) :, None])[:, 0]).tolist()
    how = dataclasses.replace(HOW, batch=batch)
    found = records(Variant(full, "full cache"), "forced", samples, tmp_path, how)
    assert sum(r.tokens for r in found) == len(losses) > 50
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(found, samples) == pytest.approx(expected, rel=1e-3)
    assert sum(r.nll or 0 for r in found) == pytest.approx(sum(losses), rel=1e-3)


def test_greedy_text_is_that_of_generate(
    uniform: Bundle, samples: list[EvaluationSample], tmp_path: Path
) -> None:
    found = records(Variant(uniform, "", kv_keep=0.4), "greedy", samples, tmp_path)
    with Model(uniform.folder) as model:
        for record, sample in zip(found, samples, strict=True):
            answer = model.generate(sample.prompt, sample.images, max_new_tokens=8, kv_keep=0.4)
            assert record.text == answer.text.strip()
            assert record.tokens == answer.stats.new_tokens
            assert record.cache_bytes_used == answer.stats.cache_bytes_used
            assert record.cache_bytes_allocated == answer.stats.cache_bytes_allocated


def test_the_second_question_of_a_conversation(
    uniform: Bundle, samples: list[EvaluationSample], tmp_path: Path
) -> None:
    """Beside questions of one turn, in one batch."""
    turn = ("What is there?", "A few digits.")
    second = dataclasses.replace(samples[0], id="second", before=(turn,))
    both, variant = [samples[0], second], Variant(uniform, "", kv_keep=0.4)
    how = dataclasses.replace(HOW, batch=2)
    texts = [r.text for r in records(variant, "greedy", both, tmp_path, how)]
    forced = records(variant, "forced", both, tmp_path, how)
    content = [*({"type": "image", "image": i} for i in second.images)]
    messages = [
        {"role": "user", "content": [*content, {"type": "text", "text": turn[0]}]},
        {"role": "assistant", "content": turn[1]},
        {"role": "user", "content": second.prompt},
    ]
    with Model(uniform.folder) as model:
        answers = [
            model.generate(samples[0].prompt, samples[0].images, max_new_tokens=8, kv_keep=0.4),
            model.generate(messages, max_new_tokens=8, kv_keep=0.4),
        ]
        ids = answer_ids(model.tokenizer, "Q", second.answer)
        scored = model.score(messages, ids, kv_keep=0.4)
    assert texts == [answer.text.strip() for answer in answers]
    assert forced[1].nll == pytest.approx(-sum(s.logprob for s in scored.scores), rel=1e-3)
    assert forced[1].nll != pytest.approx(forced[0].nll, rel=1e-3)


def test_forced_tokens_meet_the_same_cache_as_generated_ones(
    uniform: Bundle, samples: list[EvaluationSample]
) -> None:
    """The model's own answer, fed to it, is as likely as when it chose it: eviction happens, and
    in the same places."""
    answers: list[list[int]] = []
    texts, images = [s.prompt for s in samples], [s.images for s in samples]
    with Model(uniform.folder) as model:
        for text, image, length in zip(texts, images, (40, 12, 3), strict=True):
            own = model.generate(text, image, max_new_tokens=length, kv_keep=0.3, logprobs=1)
            fed = model.score(text, own.token_ids, image, kv_keep=0.3, logprobs=1)
            assert fed.token_ids == own.token_ids
            assert fed.stats.cache_bytes_used == own.stats.cache_bytes_used
            assert fed.scores == own.scores
            answers.append(own.token_ids)
        together = model.score(texts, answers, images, kv_keep=0.3)
        assert [one.token_ids for one in together] == answers


def test_compression_costs_perplexity_and_frees_cache(
    full: Bundle, uniform: Bundle, samples: list[EvaluationSample], tmp_path: Path
) -> None:
    whole = records(Variant(full, "full cache"), "forced", samples, tmp_path)
    short = records(Variant(uniform, "", kv_keep=0.2), "forced", samples, tmp_path)
    same = records(Variant(uniform, "", kv_keep=1.0), "forced", samples, tmp_path)
    assert perplexity(same, samples) == pytest.approx(perplexity(whole, samples), rel=1e-4)
    assert perplexity(short, samples) > 1.5 * perplexity(whole, samples)
    for a, b in zip(short, whole, strict=True):
        assert a.cache_bytes_used < 0.3 * b.cache_bytes_used


def test_an_answer_follows_its_prompt_as_in_training(full: Bundle) -> None:
    """tiny-llava was trained on "ASSISTANT: The …"; the space belongs to the first word."""
    runner = BundleRunner(full, HOW)
    (sample,) = read_samples("digits", samples=1, kinds=["describe"])
    tokens = AutoTokenizer.from_pretrained(SHIPPED)
    answer = tokens(f" {sample.answer}", add_special_tokens=False)["input_ids"]
    assert list(runner.shape(sample).answer) == answer
    padded = dataclasses.replace(sample, answer=f"\n {sample.answer}  ")
    assert list(runner.shape(padded).answer) == answer


def test_answers_of_other_tokenizers(tmp_path: Path) -> None:
    """As Llama's SentencePiece, which puts a space before every text: the papers' scripts encode
    the answer alone. As chat formats whose prompts end a line: no space comes between."""

    def tokenizer(normalizer: Any) -> Tokenizer:
        letters = ["<unk>", *"▁ abcdef:\n", "▁a", " a", "▁ab", "\n\n"]
        merges = [("▁", "a"), (" ", "a"), ("▁a", "b"), ("\n", "\n")]
        vocab = {token: number for number, token in enumerate(letters)}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>"))
        if normalizer:
            made.normalizer = normalizer
        made.save(str(tmp_path / "tokenizer.json"))
        return Tokenizer(tmp_path / "tokenizer.json", [])

    rules = tokenizers.normalizers
    llama = tokenizer(rules.Sequence([rules.Prepend("▁"), rules.Replace(" ", "▁")]))
    alone = llama.encode("abc de", add_special_tokens=False)
    assert answer_ids(llama, "cd e:", "abc de") == alone
    plain = tokenizer(None)
    assert answer_ids(plain, "cd:", "abc") == plain.encode(" abc")
    assert answer_ids(plain, "cd:\n", "abc") == plain.encode("abc")
    assert answer_ids(plain, "cd:", "  abc\n") == plain.encode(" abc")
    assert plain.encode("cd a")[: len(plain.encode("cd "))] != plain.encode("cd ")
    assert answer_ids(plain, "cd ", "abc") == plain.encode("abc")
