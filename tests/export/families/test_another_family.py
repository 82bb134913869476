"""A new family is one file, with its own leaf modules, rotary embeddings and windows per layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bundles import their_answer
from lowering_tools import TARGETS, in_place, lowered
from PIL import Image
from random_weights import randomise
from settings import ASSETS
from transformers import LlavaForConditionalGeneration
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3RMSNorm,
    Gemma3TextScaledWordEmbedding,
)

import lvlm
from lvlm.core import discovery
from lvlm.core.errors import CheckpointError, ParameterError
from lvlm.export import export_cli as cli
from lvlm.export import families
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import ExportPlan, make_plan
from lvlm.export.families.family import Family
from lvlm.export.recipes.lightvlm import LightVLM
from lvlm.export.recipes.none import NoCompression
from lvlm.export.recipes.recipe import Recipe
from lvlm.export.reference.torch_reference import Reference
from lvlm.export.verify.checks import difference
from lvlm.export.verify.extended import in_pieces
from lvlm.runtime.engine import calls
from lvlm.runtime.options.generation_options import GenerationOptions

WINDOW = 20  # as the family has it
FOLDER = Path(__file__).parent / "another"
IMAGE = np.asarray(Image.open(ASSETS / "samples/digits-1.png"))
# Longer than the window, and shorter, which the answer is not
ROWS: list[tuple[str, list[np.ndarray]]] = [
    ("USER: <image>\nDescribe the picture, and say what is in its top row. ASSISTANT:", [IMAGE]),
    ("Why?", []),
]


@pytest.fixture(scope="module")
def family() -> Iterator[Family]:
    families.__path__.append(str(FOLDER))
    discovery.discover.cache_clear()
    yield discovery.discover("lvlm.export.families", "FAMILY")["llava-gemma"]
    families.__path__.remove(str(FOLDER))
    discovery.discover.cache_clear()


@pytest.fixture(scope="module")
def theirs(family: Family) -> Any:
    """transformers' own model."""
    _, config = next(iter(family.tiny_configs()))
    model = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
    randomise(model, 5)
    return model


@pytest.fixture(scope="module")
def folder(family: Family, theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("another") / "checkpoint"
    theirs.save_pretrained(path)
    config = json.loads((path / "config.json").read_text()) | {"model_type": "llava_gemma"}
    files = family.tiny_files(theirs.config) | {"config.json": json.dumps(config)}
    for name, content in files.items():
        (path / name).write_text(content)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ASSETS / "digits-llava" / name, path)
    return path


def plan(folder: Path, recipe: Recipe, **options: Any) -> ExportPlan:
    return make_plan(ExportOptions(str(folder), recipe, folder.parent / "out", **options))


@pytest.mark.slow
def test_answers_are_those_of_transformers(
    family: Family, theirs: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token for token: on the CPU, alone and together, in the torch reference, and in the graphs of
    a target whose plugin attends in every layer."""
    out = tmp_path / "out"
    assert cli.main(["-m", str(folder), "-r", "none", "-o", str(out), "-q", "--no-validate"]) == 0
    options: dict[str, Any] = {"chat_template": False, "max_new_tokens": 40, "ignore_eos": True}
    with lvlm.load(out) as model:
        prompts = [model.prepare(0, *row, GenerationOptions(**options)) for row in ROWS]
        alone = [list(model.generate(*row, **options).token_ids) for row in ROWS]
        both = model.generate([row[0] for row in ROWS], [row[1] for row in ROWS], **options)
        graphs = model.calls.graphs
        pieces = in_pieces(graphs, prompts[0], graphs.encode(prompts[0].images))
        (logits,) = model.calls.start(prompts[:1]).logits
    assert max(difference(found, logits) for found in pieces) < 1e-4  # windows reach into the past
    expected = [answer(theirs, family, prompt) for prompt in prompts]
    assert alone == expected
    assert [list(found.token_ids) for found in both] == expected
    assert len(prompts[0].ids) > 2 * WINDOW > WINDOW > len(prompts[1].ids)
    reference = Reference(family, theirs.config, in_graphs(theirs), NoCompression())
    features = reference.encode(prompts[0].images)
    assert reference.generate(prompts[0], features, max_new_tokens=40).tokens == expected[0]
    # Angles once for each of two rotary embeddings, a mask for half of the layers
    ops = [
        node.op_type
        for node in onnx.load(out / "prefill.onnx", load_external_data=False).graph.node
    ]
    assert [ops.count(op) for op in ("Cos", "RotaryEmbedding", "CausalAttention")] == [2, 8, 2]

    target = TARGETS["jetson-orin-jp62"]
    plugged = lowered(out, tmp_path / "plugged", target)
    for name in ("prefill", "extend", "decode"):
        nodes = onnx.load(
            plugged / target.file(f"{name}.onnx"), load_external_data=False
        ).graph.node
        attends = [node for node in nodes if node.op_type == "CacheAttention"]
        windows = [{a.name: a.i for a in node.attribute}["window"] for node in attends]
        assert windows == [WINDOW, 0] * 2
        assert not {"Softmax", "Less"} & {node.op_type for node in nodes}
    monkeypatch.setattr(calls, "CAPACITY_STEP", 10**6)  # its graphs take full buffers only
    with lvlm.load(in_place(plugged, target)) as model:
        assert [list(model.generate(*row, **options).token_ids) for row in ROWS] == expected
        graphs = model.calls.graphs
        pieces = in_pieces(graphs, prompts[0], graphs.encode(prompts[0].images))
        assert max(difference(found, logits) for found in pieces) < 1e-4


def test_a_recipe_that_moves_entries_does_not_go_with_a_window(folder: Path) -> None:
    with pytest.raises(
        ParameterError, match=r"lightvlm cannot .* \(sliding_window 20: layers 0, 2\)"
    ):
        plan(folder, LightVLM(), max_text_len=100)
    with pytest.raises(ParameterError, match="lower --max-text-len to 4 or less"):
        plan(folder, LightVLM(), max_text_len=5)
    plan(folder, LightVLM(), max_text_len=4)  # all of the window, with an image


def test_a_leaf_module_in_no_table_is_named(
    family: Family, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = dict(family.leaves)
    for kind, said in (
        (Gemma3RMSNorm, "Gemma3RMSNorm .* is in no table of leaf modules; say in the leaves of"),
        (Gemma3Attention, "Gemma3Attention .* leaves of lvlm.export.families.llava_gemma"),
        (Gemma3TextScaledWordEmbedding, "Gemma3TextScaledWordEmbedding .* in no table"),
    ):
        rest = {k: leaf for k, leaf in table.items() if k is not kind}
        monkeypatch.setattr(type(family), "leaves", rest)
        with pytest.raises(CheckpointError, match=said):
            plan(folder, NoCompression())


def in_graphs(theirs: Any) -> Any:
    """transformers' model with the attention of our graphs."""
    theirs.set_attn_implementation("lvlm")
    return theirs


def answer(theirs: Any, family: Family, prompt: Any) -> list[int]:
    given = family.transformers_inputs(prompt)
    return their_answer(theirs, prompt.ids, given, max_new_tokens=40, min_new_tokens=40)
