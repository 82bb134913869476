"""Importances against transformers' own attention; prompts as a bundle makes them; resuming."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import TINY, USUAL, moves, transformers_inputs
from rows import profile_rows
from settings import ASSETS
from transformers import AutoModelForImageTextToText

import lvlm
from lvlm.core.discovery import discover
from lvlm.core.errors import CheckpointError, ImageError, ParameterError, PromptError
from lvlm.export.budgets import importance_recording, measuring, sample_prompts
from lvlm.export.budgets.calibration_samples import CalibrationSample, builtin_samples
from lvlm.export.budgets.importance_recording import record_importances
from lvlm.export.budgets.measuring import calibrate
from lvlm.export.budgets.prefix_profiles import ModelId, PrefixProfile, RecipeId
from lvlm.export.budgets.prefix_search import grid
from lvlm.export.checkpoint import checkpoint as checkpoints
from lvlm.export.recipes.recipe import Recipe, parse_settings
from lvlm.export.reference.torch_reference import Reference
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.prompts import Prompt

MODEL = ModelId("m", "M", "0" * 64)


def recipe(name: str, *settings: str) -> Recipe:
    return parse_settings(discover("lvlm.export.recipes", "RECIPE")[name], settings)


def open_folder(folder: Path) -> tuple[checkpoints.Checkpoint, Any, Any]:
    source = checkpoints.Checkpoint(folder, str(folder), None)
    family = checkpoints.find_family(source.config, "")
    return source, family, family.read_config(source.config)


def load(folder: Path, used: Recipe) -> Reference:
    _, family, config = open_folder(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation("lvlm")
    return Reference(family, config, model, used)


def prompts(folder: Path, count: int) -> list[Prompt]:
    maker = sample_prompts.prompt_maker(*open_folder(folder))
    samples = [
        *builtin_samples()[: count - 1],
        CalibrationSample((), "How often does 7 appear?", "text"),
    ]
    return [sample_prompts.prepare(maker, sample) for sample in samples]


def attention(folder: Path, prompt: Prompt) -> list[np.ndarray]:
    """Column sums of transformers' eager attention, [N] of every layer."""
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.tensor([list(prompt.ids)])
    images = transformers_inputs(folder, prompt)
    with torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            output_attentions=True,
            use_cache=False,
            **images,
        )
    return [a[0].double().mean(0).sum(0).numpy() for a in out.attentions]


@pytest.mark.parametrize("name", ["digits-llava", *filter(moves, TINY)])
def test_importances_are_the_column_sums_of_the_attention(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name)
    reference = load(folder, recipe("none"))
    for prompt in prompts(folder, 2):
        found, expected = record_importances(reference, prompt), attention(folder, prompt)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
            assert ours.sum() == pytest.approx(len(prompt.ids), rel=1e-5)  # a row sums to 1


def test_importances_under_merging_are_of_the_shorter_sequence() -> None:
    folder = ASSETS / "digits-llava"
    (prompt, _) = prompts(folder, 2)
    text = len(prompt.ids) - 144
    merging = load(folder, recipe("lightvlm", "keep=0.1"))
    found = record_importances(merging, prompt)
    steps = [144, *(round(144 * 0.1 ** (i / 3)) for i in (1, 2, 3))]
    assert [len(x) - text for x in found] == [steps[min(i, 3)] for i in range(6)]
    plain = record_importances(load(folder, recipe("none")), prompt)
    np.testing.assert_array_equal(found[0], plain[0])  # before the first merge
    for merged in found:
        assert merged.sum() == pytest.approx(len(merged), rel=1e-5)
    # The recipe is as it was, and compression of the cache changes nothing.
    assert merging.recipe.name == "lightvlm"
    other = record_importances(load(folder, recipe("uniform", "kv_keep=0.1")), prompt)
    for a, b in zip(plain, other, strict=True):
        np.testing.assert_array_equal(a, b)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "every_name" in metafunc.fixturenames:
        names = TINY if metafunc.config.getoption("--whole") else USUAL
        metafunc.parametrize("every_name", ["digits-llava", *names])


def test_prompts_equal_those_of_a_bundle(
    every_name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    maker = sample_prompts.prompt_maker(*open_folder(checkpoint(every_name)))
    with lvlm.load(bundle(every_name, max_images=2)) as model:
        for sample in (*builtin_samples()[:2], CalibrationSample((), "Hello", "text")):
            ours = sample_prompts.prepare(maker, sample)
            theirs = model.prepare(0, sample.prompt, sample.images, GenerationOptions())
            assert list(ours.ids) == list(theirs.ids)
            np.testing.assert_array_equal(ours.image_id, theirs.image_id)
            assert [p.digest() for p in ours.images] == [p.digest() for p in theirs.images]


def test_prompts_without_a_chat_template(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("digits-llava"), tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    maker = sample_prompts.prompt_maker(*open_folder(folder))
    image = builtin_samples()[0].images[0]
    text = "<image>\n<image>\nWhich?"
    bare = sample_prompts.prepare(maker, CalibrationSample((image, image), "Which?", "a"))
    assert list(bare.ids) == list(
        sample_prompts.prepare(maker, CalibrationSample((image,) * 2, text, "a")).ids
    )
    assert int((bare.image_id == 2).sum()) == 144


def test_prompts_of_a_template_that_takes_text(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("digits-llava"), tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endfor %}"
    )
    maker = sample_prompts.prompt_maker(*open_folder(folder))
    image = builtin_samples()[0].images[0]
    made = sample_prompts.prepare(maker, CalibrationSample((image,), "Which?", "a"))
    assert int((made.image_id == 1).sum()) == 144
    text = maker.tokenizer.decode([i for i in made.ids if i != maker.images.token_id])
    assert text == "USER: \nWhich? "


@pytest.mark.parametrize(
    ("sample", "kind", "message"),
    [
        (
            CalibrationSample((b"junk",), "Hi", "d.jsonl:4"),
            ImageError,
            "d.jsonl:4: the image given as 4",
        ),
        (
            CalibrationSample((), "<image>", "d.jsonl:7"),
            PromptError,
            "d.jsonl:7: the prompt has 1 image",
        ),
        (CalibrationSample((), " ", "d.jsonl:9"), PromptError, "d.jsonl:9: the prompt is empty"),
    ],
)
def test_a_sample_that_cannot_be_prepared_is_named(
    sample: CalibrationSample, kind: type[Exception], message: str
) -> None:
    maker = sample_prompts.prompt_maker(*open_folder(ASSETS / "digits-llava"))
    with pytest.raises(kind) as error:
        sample_prompts.prepare(maker, sample)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% if %}", "is not valid"),
        ("{{ 'a' * 10**10 }}", "asks for what templates may not: it makes too much text"),
        ("{{ ''.__class__ }}", "asks for what templates may not: access to '__class__'"),
    ],
)
def test_a_checkpoint_without_a_usable_template(
    template: str, said: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("digits-llava"), tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=f"its chat template {said}") as error:
        sample_prompts.prompt_maker(*open_folder(folder))
    assert "bundle" not in str(error.value)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return load(ASSETS / "digits-llava", recipe("none"))


@pytest.fixture(scope="module")
def ready() -> list[Prompt]:
    return prompts(ASSETS / "digits-llava", 3)


@pytest.fixture(scope="module")
def whole(reference: Reference, ready: list[Prompt]) -> PrefixProfile:
    return calibrate(reference, MODEL, ready, 0.2)


def test_profile_holds_what_was_measured(
    reference: Reference, ready: list[Prompt], whole: PrefixProfile
) -> None:
    measured = [record_importances(reference, prompt) for prompt in ready]
    assert whole.rows == profile_rows(measured, grid(0.2))
    assert (whole.layers, whole.keep, whole.data.samples) == (6, 0.2, 3)
    each = np.array(whole.spread.fractions)
    assert each.shape == (3, 6)
    np.testing.assert_allclose(whole.spread.std, each.std(0))
    # One budget for all layers together, exactly, of every sample.
    assert (each.sum(1) * [len(p.ids) for p in ready]).tolist() == pytest.approx(
        [round(0.2 * 6 * len(p.ids)) for p in ready]
    )
    assert whole.recipe == RecipeId("none", {})
    assert calibrate(reference, MODEL, ready[:2], 0.2).data.sha256 != whole.data.sha256


class StoppedError(Exception):
    pass


def counted(monkeypatch: pytest.MonkeyPatch, limit: int = 99) -> list[int]:
    """Lengths of the prompts that are read; StoppedError after ``limit`` of them."""
    read: list[int] = []

    def record(reference: Reference, prompt: Prompt) -> Any:
        if len(read) == limit:
            raise StoppedError
        read.append(len(prompt.ids))
        return importance_recording.record_importances(reference, prompt)

    monkeypatch.setattr(measuring, "record_importances", record)
    return read


def test_a_run_cut_short_goes_on_where_it_stopped(
    reference: Reference,
    ready: list[Prompt],
    whole: PrefixProfile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = tmp_path / "p.json.partial.jsonl"
    counted(monkeypatch, limit=2)
    with pytest.raises(StoppedError):
        calibrate(reference, MODEL, ready, 0.2, work=work)
    # As if it had been killed while it wrote.
    text = work.read_text()
    assert text.count("\n") == 2
    work.write_text(text[: len(text) // 2 + 40])
    read, seen = counted(monkeypatch), []
    again = calibrate(
        reference, MODEL, ready, 0.2, work=work, on_sample=lambda *call: seen.append(call)
    )
    assert again == whole
    assert read == [len(p.ids) for p in ready[1:]]
    assert seen == [(1, True), (2, False), (3, False)]
    read = counted(monkeypatch)
    assert calibrate(reference, MODEL, ready, 0.2, work=work) == whole
    assert read == []


@pytest.mark.parametrize("what", ["keep", "model", "recipe", "values"])
def test_another_setting_reads_anew(
    what: str,
    reference: Reference,
    ready: list[Prompt],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = tmp_path / "work"
    calibrate(reference, MODEL, ready[:1], 0.2, work=work)
    read = counted(monkeypatch)
    model, keep = MODEL, 0.2
    if what == "keep":
        keep = 0.22
    elif what == "model":
        model = ModelId("m", "M", "1" * 64)
    elif what == "recipe":
        reference = load(ASSETS / "digits-llava", recipe("lightvlm"))
    else:
        work.write_text(work.read_text().replace("[0.", "[7.", 1))
    found = calibrate(reference, model, ready[:1], keep, work=work)
    assert len(read) == 1
    assert found == calibrate(reference, model, ready[:1], keep)


def test_another_image_is_another_sample(
    reference: Reference, ready: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same question twice is read once."""
    first, second = ready[:2]
    assert list(first.ids) == list(second.ids)
    read = counted(monkeypatch)
    twice = calibrate(reference, MODEL, [first, first], 0.2)
    assert len(read) == 1
    both = calibrate(reference, MODEL, [first, second], 0.2)
    assert len(read) == 3
    assert twice.data.samples == both.data.samples == 2
    assert twice.data.sha256 != both.data.sha256
    assert twice.spread.std == (0.0,) * 6


def test_no_samples(reference: Reference) -> None:
    with pytest.raises(ParameterError, match="no samples"):
        calibrate(reference, MODEL, [], 0.2)


def test_a_model_that_computes_no_numbers(ready: list[Prompt]) -> None:
    broken = load(ASSETS / "digits-llava", recipe("none"))
    with torch.no_grad():
        next(iter(broken.language.blocks[2].parameters())).fill_(float("nan"))
    with pytest.raises(ParameterError, match="layer 2 are not all finite"):
        calibrate(broken, MODEL, ready[:1], 0.2)
