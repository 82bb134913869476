"""The loop: figures against transformers' own, fractions, eviction, what is run again or not."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from bundles import transformers_inputs
from hypothesis import given
from hypothesis import strategies as st
from settings import ASSETS, CACHED
from transformers import AutoModelForImageTextToText, AutoTokenizer

from lvlm.calibration.datasets.samples import EvaluationSample, read_samples
from lvlm.calibration.evaluate import evaluation
from lvlm.calibration.evaluate.evaluation import evaluate, plan_jobs
from lvlm.calibration.evaluate.fit import Shape, new_tokens, solve_keep
from lvlm.calibration.evaluate.metrics import METRICS
from lvlm.calibration.evaluate.records import RecordStore, ResultsError, Run, SampleRecord
from lvlm.calibration.evaluate.variant_runner import BundleRunner, Conditions, answer_ids
from lvlm.calibration.evaluate.variants import Bundle, Variant, reference_of, variants
from lvlm.core.errors import CapacityError, ParameterError
from lvlm.runtime.bundle.manifest import Reduction
from lvlm.runtime.kv.image_tokens import keep_ratios, tokens_per_layer
from lvlm.runtime.model import Model
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.text import Tokenizer

HOW = Conditions(max_new_tokens=8)
IMAGE_TOKENS = 144
LAYERS = 6


@pytest.fixture(scope="module")
def full(bundle: Callable[..., Path]) -> Bundle:
    return Bundle.read(bundle("tiny-llava", max_images=2), "full")


@pytest.fixture(scope="module")
def light(bundle: Callable[..., Path]) -> Bundle:
    return Bundle.read(bundle("tiny-llava", *CACHED["lightvlm (cached)"], max_images=2))


@pytest.fixture(scope="module")
def uniform(bundle: Callable[..., Path]) -> Bundle:
    return Bundle.read(bundle("tiny-llava", *CACHED["uniform (cached)"], max_images=2))


@pytest.fixture(scope="module")
def samples() -> list[EvaluationSample]:
    return read_samples("digits", samples=3, kinds=["describe", "row", "cell"])


def records(
    variant: Variant,
    run: Run,
    samples: Sequence[EvaluationSample],
    folder: Path,
    how: Conditions = HOW,
) -> list[SampleRecord]:
    (job,) = plan_jobs([(variant, run)], samples, how)
    store = RecordStore(folder / "records.jsonl")
    list(evaluate([job], samples, how, store))
    found = [store.get(key) for key in job.keys]
    assert None not in found
    return [record for record in found if record is not None]


def perplexity(found: Sequence[SampleRecord], samples: Sequence[EvaluationSample]) -> float:
    ppl = METRICS["ppl"]
    return ppl.value([ppl.score(s, r, None) for s, r in zip(samples, found, strict=True)])


# Figures


@pytest.mark.parametrize("batch", [1, 2])
def test_perplexity_equals_that_of_transformers(
    full: Bundle, samples: list[EvaluationSample], tmp_path: Path, batch: int
) -> None:
    """One forward over prompt and answer, prepared by transformers' own tokenizer and template."""
    folder = ASSETS / "tiny-llava"
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
    tokens = AutoTokenizer.from_pretrained(ASSETS / "tiny-llava")
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


# Fractions


def test_kept_fraction_is_exact(
    full: Bundle, light: Bundle, uniform: Bundle, samples: list[EvaluationSample], tmp_path: Path
) -> None:
    lengths = [IMAGE_TOKENS + s.text_tokens for s in map(BundleRunner(full, HOW).shape, samples)]
    assert all(r.kept == 1 for r in records(Variant(full, ""), "greedy", samples, tmp_path))
    for run in ("forced", "greedy"):
        found = records(Variant(uniform, "", kv_keep=0.3), run, samples, tmp_path)
        assert [r.kept for r in found] == pytest.approx([round(0.3 * n) / n for n in lengths])
    ratios = keep_ratios(light.manifest.reductions, 1.0, 0.2)
    image = tokens_per_layer(light.manifest.reductions, ratios, IMAGE_TOKENS, LAYERS)
    expected = [(sum(image) / LAYERS + n - IMAGE_TOKENS) / n for n in lengths]
    found = records(Variant(light, "", keep=0.2), "forced", samples, tmp_path)
    assert [r.kept for r in found] == pytest.approx(expected)
    (variant,) = variants([light], [], [0.3])
    found = records(variant, "forced", samples, tmp_path)
    assert [r.kept for r in found] == pytest.approx([math.ceil(0.3 * n) / n for n in lengths])
    assert all(r.keep is None for r in found)


def test_a_wanted_fraction_is_reached_by_merging(
    light: Bundle, samples: list[EvaluationSample], tmp_path: Path
) -> None:
    (variant,) = variants([light], [0.5], [])
    shapes = [BundleRunner(light, HOW).shape(sample) for sample in samples]
    found = records(variant, "forced", samples, tmp_path, dataclasses.replace(HOW, batch=2))
    for record, shape in zip(found, shapes, strict=True):
        assert record.kept is not None
        assert abs(record.kept - 0.5) * (IMAGE_TOKENS + shape.text_tokens) <= 1
        assert record.keep == solve_keep(light.manifest, shape, 0.5).keep
    assert len({record.keep for record in found}) > 1  # each prompt has its own


@given(
    text=st.integers(1, 400),
    image=st.integers(1, 3000),
    stages=st.sets(st.integers(1, 11), min_size=1, max_size=4),
    wanted=st.floats(0.01, 1.0),
)
def test_solved_keep_gives_the_fraction_within_one_token(
    text: int, image: int, stages: set[int], wanted: float
) -> None:
    reductions = tuple(
        Reduction(layer, (i + 1) / len(stages), None, 0.1) for i, layer in enumerate(sorted(stages))
    )
    manifest: Any = SimpleNamespace(
        reductions=reductions, keep=0.35, text=SimpleNamespace(layers=12)
    )
    reach = solve_keep(manifest, Shape(text, (image,), (1,)), wanted)
    length = text + image
    first = min(stages)
    assert reach.least == pytest.approx((12 * text + first * image + 12 - first) / 12 / length)
    if reach.keep is None:
        assert wanted * length < reach.least * length - 1 + 1e-6
        return
    ratios = keep_ratios(reductions, 0.35, reach.keep)
    left = text + sum(tokens_per_layer(reductions, ratios, image, 12)) / 12
    assert abs(left - wanted * length) <= 1 + 1e-6
    # Not at the edge of a count: a rounded copy of the number does the same
    ratios = keep_ratios(reductions, 0.35, float(f"{reach.keep:.12g}"))
    assert text + sum(tokens_per_layer(reductions, ratios, image, 12)) / 12 == left


def test_out_of_reach_is_recorded_and_nothing_is_run(
    light: Bundle, samples: list[EvaluationSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BundleRunner, "run", None)
    (variant,) = variants([light], [0.1], [])
    found = records(variant, "greedy", samples, tmp_path)
    assert [r.kept for r in found] == [None] * 3
    # Text, one of six blocks before the first reduction, one token in each of the others
    shapes = map(BundleRunner(light, HOW).shape, samples)
    least = [
        (s.text_tokens + (IMAGE_TOKENS + 5) / 6) / (IMAGE_TOKENS + s.text_tokens) for s in shapes
    ]
    assert [r.least for r in found] == pytest.approx(least)


# What is evaluated


def test_rows_of_bundles(full: Bundle, light: Bundle, uniform: Bundle) -> None:
    def rows(
        bundles: list[Bundle], keeps: list[float], kv_keeps: list[float]
    ) -> list[tuple[Any, ...]]:
        found = variants(bundles, keeps, kv_keeps)
        return [(v.bundle.label, v.setting, v.keep, v.kv_keep, v.wanted) for v in found]

    merging = without_compression(light)
    u, m = uniform.label, light.label
    assert rows([full, uniform], [], []) == [
        ("full", "full cache", None, None, None),
        (u, "as exported", None, None, None),
    ]
    assert rows([full, uniform, light, merging], [0.2, 0.5], []) == [
        ("full", "full cache", None, None, None),
        (u, "keep 0.2", None, 0.2, None),
        (u, "keep 0.5", None, 0.5, None),
        (m, "keep 0.2", None, 1.0, 0.2),
        (m, "keep 0.5", None, 1.0, 0.5),
        (m, "keep 0.2", None, None, 0.2),
        (m, "keep 0.5", None, None, 0.5),
    ]
    assert rows([light], [0.2], [0.5]) == [
        (m, "keep 0.2", None, 1.0, 0.2),
        (m, "kv-keep 0.5", 1.0, 0.5, None),
    ]
    assert rows([uniform, light, merging], [], [0.5]) == [
        (u, "as exported", None, None, None),
        (m, "kv-keep 0.5", 1.0, 0.5, None),
        (m, "as exported", None, None, None),
    ]


def without_compression(bundle: Bundle) -> Bundle:
    manifest = dataclasses.replace(bundle.manifest, cache_policy=None)
    return dataclasses.replace(bundle, manifest=manifest)


def test_fractions_that_cannot_be_taken(full: Bundle, light: Bundle, uniform: Bundle) -> None:
    with pytest.raises(ParameterError, match="full keeps the full cache"):
        variants([full], [0.5], [])
    with pytest.raises(ParameterError, match="merge tokens and also compress"):
        variants([without_compression(light), uniform], [], [0.5])
    fixed = dataclasses.replace(light.manifest.reductions[0], exponent=None, ratio=0.5)
    manifest = dataclasses.replace(light.manifest, reductions=(fixed,))
    scheduled = dataclasses.replace(light, manifest=manifest)
    with pytest.raises(ParameterError, match="schedule of its own"):
        variants([scheduled], [0.5], [])
    assert variants([scheduled], [], [])[0].setting == "as exported"


def test_the_reference_is_the_full_cache_of_the_same_model(full: Bundle, light: Bundle) -> None:
    half = dataclasses.replace(full, manifest=dataclasses.replace(full.manifest, dtype="float16"))
    other = dataclasses.replace(
        full, manifest=dataclasses.replace(full.manifest, model={"source": "other"})
    )
    assert reference_of(light, [light, other, half, full]) is full
    assert reference_of(light, [half]) is half
    with pytest.raises(ParameterError, match="--reference"):
        reference_of(light, [light, other])


# Resuming


class Spy:
    """Counts the batches that are run, and stops at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int = 10**9) -> None:
        self.batches: list[list[str]] = []
        run = BundleRunner.run

        def counted(runner: BundleRunner, *args: Any) -> list[SampleRecord]:
            if len(self.batches) == stop_at:
                raise KeyboardInterrupt
            self.batches.append([sample.id for sample in args[3]])
            return run(runner, *args)

        monkeypatch.setattr(BundleRunner, "run", counted)


def test_an_interrupted_run_goes_on_and_a_finished_one_loads_nothing(
    full: Bundle, samples: list[EvaluationSample], tmp_path: Path
) -> None:
    how = dataclasses.replace(HOW, batch=2, max_new_tokens=2)
    wanted: list[tuple[Variant, Run]] = [
        (Variant(full, ""), "forced"),
        (Variant(full, ""), "greedy"),
    ]
    jobs = plan_jobs(wanted, samples, how)
    path = tmp_path / "records.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch, stop_at=3)
        with pytest.raises(KeyboardInterrupt):
            list(evaluate(jobs, samples, how, RecordStore(path)))
        assert spy.batches == [["1-describe", "2-row"], ["3-cell"], ["1-describe", "2-row"]]
    with path.open("a") as file:
        file.write('{"key": "cut sh')
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        steps = list(evaluate(jobs, samples, how, RecordStore(path)))
        assert spy.batches == [["3-cell"]]
    assert steps[-1].done == 3
    assert steps[-1].seconds_left == 0
    assert len(path.read_text().splitlines()) == 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "BundleRunner", None)
        assert list(evaluate(jobs, samples, how, RecordStore(path))) == []


def test_keys_hold_what_records_depend_on(
    full: Bundle, uniform: Bundle, samples: list[EvaluationSample]
) -> None:
    def keys(
        variant: Variant, run: Run = "greedy", data: Any = samples, **how: Any
    ) -> tuple[str, ...]:
        (job,) = plan_jobs([(variant, run)], data, dataclasses.replace(HOW, **how))
        return job.keys

    base, plain = keys(Variant(full, "a")), Variant(full, "a")
    assert keys(Variant(dataclasses.replace(full, folder=Path("moved")), "renamed")) == base
    changed = [
        keys(plain, "forced"),
        keys(Variant(uniform, "")),
        keys(Variant(full, "", keep=0.5)),
        keys(Variant(full, "", kv_keep=0.5)),
        keys(Variant(full, "", wanted=0.5)),
        keys(plain, max_new_tokens=9),
        keys(plain, device="cuda"),
        keys(plain, threads=1),
        keys(plain, system="Be kind."),
        keys(plain, batch=3),
    ]
    assert len({key for found in [base, *changed] for key in found}) == 3 * (len(changed) + 1)
    assert keys(plain, "forced", max_new_tokens=9) == keys(plain, "forced")
    assert keys(plain, data=samples[2::-2]) == base[2::-2]
    # Together in a batch with others, rounding may differ
    assert keys(plain, batch=2)[2] == base[2]
    assert set(keys(plain, batch=2)[:2]).isdisjoint(base)


def test_damaged_records_are_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ResultsError, match=r"is damaged .*remove it"):
        RecordStore(path)
    path.unlink()
    store = RecordStore(path)
    store.add([SampleRecord("a", "1", nll=0.1), SampleRecord("b", "2", text="zwei\n“2”\u2028")])
    assert RecordStore(path).get("b") == store.get("b")
    assert json.loads(path.read_text().splitlines()[0])["nll"] == 0.1


def test_what_does_not_fit_is_known_before_anything_is_run(
    full: Bundle, samples: list[EvaluationSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BundleRunner, "run", None)
    how = dataclasses.replace(HOW, max_new_tokens=5000)
    with pytest.raises(CapacityError, match=r"digits sample 1: .* of 5000 new tokens"):
        records(Variant(full, "full cache"), "greedy", samples, tmp_path, how)
    crowded = dataclasses.replace(samples[1], images=samples[1].images * 3, where="line 7")
    with pytest.raises(CapacityError, match=r"line 7: .* 0 of \d+ new tokens; .*--max-images 2"):
        records(Variant(full, ""), "forced", [samples[0], crowded], tmp_path)


@pytest.mark.parametrize("more", [-1, 0, 1, 20, 10_000])
@pytest.mark.parametrize("kv_keep", [0.2, 1.0])
def test_room_is_what_the_engine_gives(
    uniform: Bundle, samples: list[EvaluationSample], kv_keep: float, more: int
) -> None:
    """``more``: slots per layer beyond what is kept of the prompt."""
    shape = BundleRunner(uniform, HOW).shape(samples[0])
    kept = round(kv_keep * (IMAGE_TOKENS + shape.text_tokens))
    capacity = dataclasses.replace(
        uniform.manifest.capacity, per_layer=(kept + more,) * LAYERS, max_text_len=300
    )
    manifest = dataclasses.replace(uniform.manifest, capacity=capacity)
    wanted = 5000
    with Model(uniform.folder) as model:
        model.graphs.manifest = manifest
        options = GenerationOptions(max_new_tokens=wanted)
        prompt = model.prepare(0, samples[0].prompt, samples[0].images, options)
        try:
            limit = model.calls.start([prompt], None, kv_keep).running[0].row.limit
        except CapacityError:
            limit = 0
    assert new_tokens(manifest, shape, None, kv_keep, wanted) == limit
    assert (limit == 0) == (more < 0)
