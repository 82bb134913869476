"""What an export's validation notices: every fault here passes the hash of its file."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from settings import CACHED, LIGHTVLM, SMALL

import lvlm
from lvlm.core.discovery import discover
from lvlm.core.errors import ValidationError
from lvlm.export import export_plan
from lvlm.export.export_options import ExportOptions
from lvlm.export.recipes.recipe import parse_settings
from lvlm.export.verify import contents, validation, vocabulary
from lvlm.export.verify.checks import Check
from lvlm.export.verify.graph_forms import Mapped
from lvlm.export.verify.judge import Judge, Verdict
from lvlm.export.verify.outcome import ValidationOutcome
from lvlm.runtime.backends import GraphSession
from lvlm.runtime.bundle.manifest import Graph, Manifest
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.tools.recorded_answers import compare

NAME, RECIPE = "digits-llava", "none"
ELASTIC = CACHED["elastic-cache (cached)"]


def plan_of(
    checkpoint: Path,
    output: Path,
    dtype: str = "fp32",
    recipe: tuple[str, ...] = (RECIPE,),
    **options: Any,
) -> Any:
    made = parse_settings(discover("lvlm.export.recipes", "RECIPE")[recipe[0]], recipe[1:])
    return export_plan.make_plan(
        ExportOptions(str(checkpoint), made, output, dtype=dtype, max_images=2, **options)
    )


@pytest.fixture(autouse=True)
def judged_once(judges: dict[Path, Judge], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles are broken here, checkpoints never: what transformers says of one is asked once."""

    class Asked(Judge):
        def __new__(cls, folder: Path) -> Any:
            return judges.setdefault(folder, super().__new__(cls))

        def __init__(self, folder: Path) -> None:
            if not hasattr(self, "folder"):
                super().__init__(folder)

        def load_model(self, dtype: torch.dtype) -> None:
            if not hasattr(self, "model"):
                super().load_model(dtype)

        def answer(self, ids: Sequence[int], *given: Any) -> Verdict:
            answers = self.__dict__.setdefault("answers", {})
            if tuple(ids) not in answers:
                answers[tuple(ids)] = super().answer(ids, *given)
            return cast("Verdict", answers[tuple(ids)])

    monkeypatch.setattr(validation, "Judge", Asked)


@pytest.fixture(scope="module")
def judges() -> dict[Path, Judge]:
    return {}


@pytest.fixture
def good(
    bundle: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> tuple[Any, Path]:
    """A plan and a copy of its bundle, to be broken."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle(NAME, RECIPE, max_images=2), folder)
    return plan_of(checkpoint(NAME), folder), folder


def change(folder: Path, **fields: Any) -> None:
    manifest = read_bundle(folder, "none")
    dataclasses.replace(manifest, **fields).write(folder)


def of(folder: Path) -> Manifest:
    return read_bundle(folder, "none")


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """With its size in the manifest."""
    (folder / name).write_bytes(content)
    data = json.loads((folder / "lvlm.json").read_text())
    data["files"][name]["bytes"] = len(content)
    (folder / "lvlm.json").write_text(json.dumps(data))


def noticed(plan: Any, folder: Path, line: str) -> None:
    """Validation fails, and its table has that line."""
    with pytest.raises(ValidationError) as caught:
        validation.validate(plan, folder)
    assert re.search(line, caught.value.details), caught.value.details


def test_a_good_bundle_passes_and_says_what_was_run(
    good: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = good
    loaded: list[str] = []
    open_file = Mapped._open

    def noted(self: Mapped, folder: Path, graph: Graph, file: str) -> GraphSession:
        loaded.append(file)
        return open_file(self, folder, graph, file)

    monkeypatch.setattr(Mapped, "_open", noted)
    outcome = validation.validate(plan, folder)
    names = {check.name for check in outcome.checks}
    assert {"pixels of an image", "prompt's ids", "end-of-text ids"} <= names
    assert any(name.startswith("tokens unlike transformers' generate") for name in names)
    graphs = ("prefill", "extend", "decode")
    files = {"vision.onnx", *(f"{g}{form}.onnx" for g in graphs for form in ("", ".ort-cpu"))}
    assert outcome.files == dict.fromkeys(files, "run")
    assert sorted(loaded) == sorted(files)  # each once, though two runs take some of them
    assert outcome.estimate.startswith("24 tokens are compared")


def test_what_is_recorded_fits_and_is_asked_on_any_day(
    good: tuple[Any, Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of a bundle with little room, and a template that writes the date."""
    source, folder = Path(shutil.copytree(checkpoint(NAME), tmp_path / "checkpoint")), good[1]
    template = source / "chat_template.jinja"
    template.write_text('{{ strftime_now("%Y") }}' + template.read_text())
    plan = plan_of(source, folder, max_text_len=20)
    change(folder, chat_template=template.read_text(), capacity=plan.cache.capacity)
    (answer,) = validation.validate(plan, folder).answers
    assert not answer.chat_template
    assert 0 < len(answer.tokens) < validation.TOKENS
    longer = dataclasses.replace(answer, tokens=answer.tokens * 3, steps=answer.steps * 3)
    with lvlm.load(folder, verify="none") as model:
        found, more = compare(model, [answer, longer])
    assert found.passed, found
    assert "new tokens are recorded, there is room for" in more.problem


@pytest.mark.parametrize(
    ("name", "value"), [("mean", [0.5, 0.5, 0.5]), ("std", [0.5, 0.5, 0.5]), ("resample", 2)]
)
def test_other_pixels_are_noticed(good: tuple[Any, Path], name: str, value: Any) -> None:
    plan, folder = good
    images = of(folder).images
    assert name in images.processor
    change(folder, images=dataclasses.replace(images, processor={**images.processor, name: value}))
    noticed(plan, folder, "✗ pixels of ")


def test_wrong_end_of_text_is_noticed(good: tuple[Any, Path]) -> None:
    plan, folder = good
    change(folder, text=dataclasses.replace(of(folder).text, eos_ids=(5,)))
    noticed(plan, folder, "✗ end-of-text ids")


@pytest.mark.parametrize("template", ["Hello", "<image>\nHello", None])
def test_another_chat_template_is_noticed(good: tuple[Any, Path], template: str | None) -> None:
    plan, folder = good
    change(folder, chat_template=template)
    noticed(plan, folder, "✗ chat template: user")


@pytest.mark.parametrize("instead", ["BOT: ", "{{ raise_exception('no answers') }}"])
def test_other_answers_in_conversations_are_noticed(good: tuple[Any, Path], instead: str) -> None:
    plan, folder = good
    template = of(folder).chat_template
    assert template is not None
    assert "{{ 'ASSISTANT: ' }}" in template
    change(folder, chat_template=template.replace("{{ 'ASSISTANT: ' }}", instead))
    noticed(plan, folder, "✗ chat template: after an answer")


def test_one_wrong_row_of_the_embedding_is_noticed(good: tuple[Any, Path]) -> None:
    """Of a token that the prompt has not."""
    plan, folder = good
    (stored,) = (w for n, w in of(folder).weights.items() if n.endswith("embed_tokens.weight"))
    table = np.memmap(folder / stored.file, "f4", "r+", stored.offset, stored.dims)
    table[-2, 0] += 1
    table.flush()
    noticed(plan, folder, r"✗ rows of the embedding, of 512 +1 rows")


def test_another_vocabulary_is_noticed(good: tuple[Any, Path]) -> None:
    """Two tokens that no text of the corpus has, each in the other's place."""
    plan, folder = good
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    a, b = list(vocabulary)[-7], list(vocabulary)[-1]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    replace_file(folder, "tokenizer.json", json.dumps(data).encode())
    noticed(plan, folder, "✗ tokenizer: its 383 tokens")


def test_another_decoder_is_noticed(good: tuple[Any, Path]) -> None:
    plan, folder = good
    data = json.loads((folder / "tokenizer.json").read_text())
    data["decoder"] = None
    replace_file(folder, "tokenizer.json", json.dumps(data).encode())
    noticed(plan, folder, "✗ tokenizer: its 383 tokens")


def changed_token(folder: Path, content: str) -> None:
    """Answers show it."""
    data = json.loads((folder / "tokenizer.json").read_text())
    (token,) = (t for t in data["added_tokens"] if t["content"] == content)
    token["special"] = False
    replace_file(folder, "tokenizer.json", json.dumps(data).encode())


def test_another_added_token_of_the_prompts_is_noticed_by_name(good: tuple[Any, Path]) -> None:
    plan, folder = good
    changed_token(folder, "<image>")
    noticed(plan, folder, r"✗ tokenizer: its 383 tokens \('<image>'\)")


def test_another_added_token_that_no_prompt_has_is_told_by_name(good: tuple[Any, Path]) -> None:
    plan, folder = good
    changed_token(folder, "<pad>")
    outcome = validation.validate(plan, folder)
    assert outcome.unlike == ["<pad>"]
    assert any("otherwise: '<pad>'; no prompt" in line for line in outcome.told())


def test_tokens_that_differ_by_numbers_alone_are_one_kind(
    checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """Another image may have <row_2> where the prompt that is compared has <row_1>."""
    judge = Judge(checkpoint(NAME))
    judge.tokenizer.add_tokens(["<row_1>", "<row_2>", "<other>"])
    folder = bundle(NAME, RECIPE, max_images=2)
    maker = validation._prompt_maker(folder, read_bundle(folder, "none"))
    (row,) = judge.tokenizer.convert_tokens_to_ids(["<row_1>"])
    names = ["<other>", "<row_1>", "<row_2>"]
    assert vocabulary.compare(judge, maker, set()).unlike == names
    outcome = vocabulary.compare(judge, maker, {row})
    assert outcome.unlike == ["<other>"]
    assert [check.figure for check in outcome.checks] == [2, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("generation", {"repetition_penalty": 1.02}),
        ("generation", {"bad_words_ids": [[300]]}),
        ("special_tokens", {"bos_token": "</s>"}),
    ],
)
def test_another_choice_of_tokens_is_noticed(
    good: tuple[Any, Path], name: str, value: dict[str, Any]
) -> None:
    """Too small a change for the answer that is compared."""
    plan, folder = good
    change(folder, **{name: {**getattr(of(folder), name), **value}})
    noticed(plan, folder, "✗ manifest: generation, special tokens")


@pytest.mark.parametrize("field", ["capacity", "cache_policy", "parameters"])
def test_what_only_longer_prompts_would_show_is_noticed(
    field: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path], tmp_path: Path
) -> None:
    plan = plan_of(checkpoint(NAME), tmp_path / "bundle", recipe=LIGHTVLM)
    manifest = read_bundle(bundle(NAME, *LIGHTVLM, max_images=2), "none")
    assert contents.planned(plan, manifest).passed
    assert manifest.cache_policy is not None
    most = (*manifest.capacity.per_layer[:-1], manifest.capacity.per_layer[-1] - 16)
    other: dict[str, Any] = {
        "capacity": dataclasses.replace(manifest.capacity, per_layer=most),
        "cache_policy": manifest.cache_policy.at_most_every(32),
        "parameters": {**manifest.parameters, "kv_sinks": 9},
    }
    wrong = dataclasses.replace(manifest, **{field: other[field]})
    assert contents.planned(plan, wrong).figure == 1


def test_swapped_angles_in_the_canonical_decode_are_noticed(good: tuple[Any, Path]) -> None:
    plan, folder = good
    model = onnx.load(folder / "decode.onnx", load_external_data=False)
    turned = [n for n in model.graph.node if n.op_type == "RotaryEmbedding"]
    assert turned
    for node in turned:
        node.input[1], node.input[2] = node.input[2], node.input[1]
    replace_file(folder, "decode.onnx", model.SerializeToString())
    noticed(plan, folder, r"✗ decode\.onnx and transformers")


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("extend.onnx", "Less", "LessOrEqual"),  # one entry too many where there is none
        ("extend.ort-cpu.onnx", "GreaterOrEqual", "Less"),
    ],
)
def test_a_fault_in_what_reads_a_prompt_in_pieces_is_noticed(
    file: str, before: str, after: str, good: tuple[Any, Path]
) -> None:
    plan, folder = good
    model = onnx.load(folder / file, load_external_data=False)
    (node, *_) = [n for n in model.graph.node if n.op_type == before]
    node.op_type = after
    replace_file(folder, file, model.SerializeToString())
    noticed(plan, folder, rf"✗ {re.escape(file)} (and transformers|logits, extended)")


@pytest.fixture
def half(
    bundle: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> tuple[Any, Path]:
    """A plan in fp16 with a cache that ranks its entries, and sessions, and a copy of the
    bundle."""
    folder = tmp_path / "bundle"
    how: dict[str, Any] = {"dtype": "fp16", "max_images": 2, "sessions": True}
    shutil.copytree(bundle(SMALL, *ELASTIC, **how), folder)
    recipe = parse_settings(discover("lvlm.export.recipes", "RECIPE")[ELASTIC[0]], ELASTIC[1:])
    options = ExportOptions(model=str(checkpoint(SMALL)), recipe=recipe, output=folder, **how)
    return export_plan.make_plan(options), folder


def test_fp16_is_compared_in_fp32_and_as_it_is(half: tuple[Any, Path]) -> None:
    """Near ties of ranks fall otherwise in fp16, and then no two caches are alike."""
    outcome = validation.validate(*half)
    limits = {check.name: check.limit for check in outcome.checks}
    assert limits["prefill.onnx and transformers"] == 5e-2
    assert limits["prefill.onnx cache"] == limits["prefill.ort-cpu.onnx cache"] == 1e-3
    assert limits["prefill.ort-cpu.onnx logits, in fp16"] == 5e-2
    assert "prefill.ort-cpu.onnx cache, in fp16" not in limits
    assert limits["extend.onnx logits, extended"] == 1e-3
    assert limits["extend.ort-cpu.onnx logits, extended, in fp16"] == 5e-2
    assert any(note.startswith("cache of prefill.ort-cpu.onnx") for note in outcome.notes)
    assert set(outcome.files.values()) == {"run, fp16 widened to fp32, and as it is"}


def test_a_fault_in_what_reads_tokens_at_once_is_noticed(half: tuple[Any, Path]) -> None:
    plan, folder = half
    model = onnx.load(folder / "extend.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GreaterOrEqual":  # no token sees itself
            node.op_type = "Greater"
    replace_file(folder, "extend.onnx", model.SerializeToString())
    noticed(plan, folder, r"✗ extend\.onnx (logits, extended|and transformers) ")


def test_a_fault_smaller_than_what_fp16_loses_is_noticed(half: tuple[Any, Path]) -> None:
    plan, folder = half
    model = onnx.load(folder / "prefill.ort-cpu.onnx", load_external_data=False)
    norm = next(n for n in model.graph.node if "RMSNorm" in n.op_type or "LayerNorm" in n.op_type)
    epsilon = next(a for a in norm.attribute if a.name == "epsilon")
    epsilon.f *= 300
    replace_file(folder, "prefill.ort-cpu.onnx", model.SerializeToString())
    noticed(plan, folder, r"✗ prefill\.ort-cpu\.onnx cache .*limit 0\.001\)")


def test_near_ties_in_one_image_are_settled_by_another(
    half: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what both images show is a fault."""
    compare, seen = validation.against_reference, []

    def apart(
        plan: Any, folder: Path, manifest: Manifest, prompt: Any, *rest: Any
    ) -> ValidationOutcome:
        seen.append(prompt)
        if len(seen) == 1:
            return ValidationOutcome([Check("prefill.onnx cache", 1.5, 1e-3, "x")])
        return compare(plan, folder, manifest, prompt, *rest)

    monkeypatch.setattr(validation, "against_reference", apart)
    outcome = validation.validate(*half)
    assert len(seen) == 2
    assert seen[0].ids == seen[1].ids
    assert not np.array_equal(*(p.images[0].arrays["pixel_values"] for p in seen))
    assert any("near ties" in note for note in outcome.notes)
    monkeypatch.setattr(
        validation,
        "against_reference",
        lambda *_: ValidationOutcome([Check("one", 1.5, 1e-3, "x")]),
    )
    noticed(*half, "✗ one")


def test_another_graph_in_a_file_is_noticed(good: tuple[Any, Path]) -> None:
    plan, folder = good
    replace_file(folder, "decode.onnx", (folder / "vision.onnx").read_bytes())
    with pytest.raises(ValidationError, match=r"decode.onnx has other inputs or outputs"):
        validation.validate(plan, folder)
