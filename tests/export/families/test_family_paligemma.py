"""PaliGemma: prompts as its processor writes them; read as a whole, whatever was read before; what
is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bundles import FAMILIES, TINY
from parity_tools import IMAGES, ROWS, make_reference
from transformers import AutoProcessor

import lvlm
from lvlm.core.errors import BundleError, CheckpointError, ParameterError, PromptError
from lvlm.export.budgets.sample_prompts import prompt_maker
from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import ExportPlan, make_plan
from lvlm.export.recipes.recipe import known_recipe, parse_settings
from lvlm.export.summaries import bundle_files
from lvlm.runtime.engine import Engine
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.prompts import PromptMaker

FAMILY = FAMILIES["paligemma"]
WIDE, WINDOW = "paligemma:gemma2-gqa", "paligemma:gemma2-mha-bias-window"
FIRST = "paligemma:gemma-mqa"
PLAIN = GenerationOptions(chat_template=False)


def maker_of(folder: Path) -> PromptMaker:
    source = Checkpoint(folder, str(folder), None)
    return prompt_maker(source, FAMILY, FAMILY.read_config(source.config))


@pytest.fixture
def released(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint without a chat template, as released ones are."""
    folder = Path(shutil.copytree(checkpoint(WIDE), tmp_path / "released"))
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("<image>caption en", 1),
        ("<image>\n", 1),
        ("<image><image>detect 7 ; 9", 2),
        ("between <image> and <image>: which?", 2),
        ("caption en", 1),
    ],
)
def test_prompts_are_those_of_their_processor(text: str, count: int, released: Path) -> None:
    """The token that begins a text stands behind the images, a newline at the end."""
    theirs, maker = AutoProcessor.from_pretrained(released), maker_of(released)
    assert maker.template is None
    prompt = maker.prepare(0, text, IMAGES[:count], PLAIN)
    given = theirs(images=[IMAGES[:count]], text=[text], return_tensors="np")
    assert list(prompt.ids) == given["input_ids"][0].tolist()
    mine = FAMILY.transformers_inputs(prompt)
    assert mine.keys() == {"pixel_values", "token_type_ids"}
    assert [name for name in mine if not np.array_equal(mine[name], given[name])] == []
    assert np.unique(prompt.image_id, return_counts=True)[1].tolist()[1:] == [16] * count


def test_a_template_s_text_is_completed_likewise(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(WIDE)
    theirs, maker = AutoProcessor.from_pretrained(folder), maker_of(folder)
    prompt = maker.prepare(0, "Is it 7?", IMAGES[:1], GenerationOptions())
    parts = [{"type": "image"}, {"type": "text", "text": "Is it 7?"}]
    written = theirs.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    given = theirs(images=[IMAGES[:1]], text=[written], return_tensors="np")
    assert list(prompt.ids) == given["input_ids"][0].tolist()


def test_prompts_without_images_begin_as_others_do(released: Path) -> None:
    """Their processor takes none."""
    maker = maker_of(released)
    begin = maker.tokenizer.token_id("<s>")
    ids = list(maker.prepare(0, "Why?", [], PLAIN).ids)
    assert ids == [begin, *maker.tokenizer.encode("Why?\n", add_special_tokens=False)]
    with pytest.raises(PromptError, match="the prompt has 2 image placeholders for 1 image"):
        maker.prepare(0, "<image> <image>", IMAGES[:1], PLAIN)


def test_what_was_read_before_is_read_again(bundle: Callable[..., Path]) -> None:
    """Prompts that begin alike share no entries: these depend on what follows. Several answers to
    one prompt do."""
    folder = bundle(WIDE, max_images=2)
    options: dict[str, Any] = {"max_new_tokens": 6, "chat_template": False}
    begun, (text, images) = "USER: <image>\nDescribe the picture.", ROWS[0]
    with lvlm.load(folder) as model, Engine(folder, slots=3, chunk_tokens=8) as engine:
        for asked in (begun, text, begun):
            expected = model.generate(asked, images, **options)
            found = engine.generate(asked, images, **options)
            assert found.token_ids == expected.token_ids
            assert found.stats.reused_tokens == 0
        assert not engine.manifest.graphs.keys() & {"extend"}
        with pytest.raises(ParameterError, match="every turn is read as a whole; give each turn"):
            engine.session()


def test_decode_attends_by_the_engine_s_own_kernel(bundle: Callable[..., Path]) -> None:
    """On device cpu, though logits are capped; not by ours, which do not cap."""
    model = onnx.load(bundle(WIDE, max_images=2) / "decode.ort-cpu.onnx", load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert (kinds["CappedAppendedAttention"], kinds["Attention"]) == (4, 0)


def test_a_graph_that_reads_on_is_refused(bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle(WIDE, max_images=2), tmp_path / "bundle"))
    data = json.loads((folder / "lvlm.json").read_text())
    data["graphs"]["extend"] = data["graphs"]["decode"]
    (folder / "lvlm.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="lists a graph 'extend', which has no use"):
        lvlm.load(folder)


def plan(folder: Path, name: str = "none", *settings: str, **options: Any) -> ExportPlan:
    recipe = parse_settings(known_recipe(name), settings)
    return make_plan(ExportOptions(str(folder), recipe, folder.parent / "out", **options))


def test_recipes_and_windows(checkpoint: Callable[[str], Path]) -> None:
    """Where no window hides anything: all but those that rank by a prompt's queries later on, as if
    these did not see what follows."""
    wide, window, first = map(checkpoint, (WIDE, WINDOW, FIRST))
    with pytest.raises(ParameterError, match="snapkv cannot do layers with a window"):
        plan(window, "snapkv")
    for name in ("none", "divprune", "visionzip", "random", "strided"):
        plan(window, name)
    for folder in (wide, first):
        for name in ("snapkv", "lightvlm", "h2o", "tova", "fastv", "elastic-cache"):
            plan(folder, name)
    with pytest.raises(ParameterError, match="queries of prompt tokens as if these did not see"):
        plan(wide, "lightvlm", "kv_interval=31")
    with pytest.raises(ParameterError, match="every image gives 16 tokens"):
        plan(wide, "none", max_image_tokens=9)
    with pytest.raises(ParameterError, match="--sessions: tokens of a prompt of paligemma see"):
        plan(wide, "snapkv", sessions=True)
    for name in ("none", "lightvlm"):
        assert "extend.onnx" not in bundle_files(plan(wide, name))


def test_what_the_language_model_is_told(checkpoint: Callable[[str], Path]) -> None:
    told = [plan(checkpoint(name)).skeleton.language for name in (WIDE, WINDOW, FIRST)]
    assert [one.bidirectional for one in told] == ["prompt"] * 3
    assert [(one.softcap, one.head_softcap) for one in told] == [(2.0, 10.0), (1.5, 30.0), (0, 0)]
    assert [layer.window for layer in told[1].layers] == [11, None, 11]
    (rotary,) = make_reference(checkpoint(FIRST), "none").language.rotaries
    positions, hidden = torch.tensor([[0, 3]]), torch.zeros(1, 2, 16)
    for found, other in zip(
        rotary(hidden, position_ids=positions),
        rotary.rotary(hidden, positions + 1),  # type: ignore[operator]
        strict=True,
    ):
        assert torch.equal(found, other)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"text_config": {"model_type": "gemma3_text"}}, "text backbone 'gemma3_text'"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "vision tower"),
        ({"text_config": {"use_bidirectional_attention": False}}, "use_bidirectional_attention"),
        ({"text_config": {"rope_parameters": {"rope_type": "dynamic"}}}, "rope_type 'dynamic'"),
        ({"projection_dim": 32}, "projection_dim 32 does not fit the text model, of width 64"),
        ({"image_token_index": 640}, "image_token_index 640 does not fit .* 640 tokens"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], problem: str) -> None:
    raw = json.loads(TINY[WIDE][1].to_json_string(use_diff=False))
    FAMILY.read_config(raw)
    for name, value in change.items():
        raw[name] = {**raw[name], **value} if isinstance(raw.get(name), dict) else value
    with pytest.raises(CheckpointError, match=problem):
        FAMILY.read_config(raw)


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("preprocessor_config.json", {"image_seq_length": 256}, "256 .* and 4 x 4 patches"),
        ("preprocessor_config.json", {"size": {"height": 28, "width": 28}}, "takes .*'height': 56"),
        ("preprocessor_config.json", {"do_resize": False}, "images of differing sizes|takes"),
        ("tokenizer_config.json", {"bos_token": None}, "names no bos_token"),
    ],
)
def test_files_that_do_not_fit(
    file: str, change: dict[str, Any], problem: str, released: Path
) -> None:
    path = released / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    config = FAMILY.read_config(json.loads((released / "config.json").read_text()))
    with pytest.raises((CheckpointError, ParameterError), match=problem):
        FAMILY.images(config, released)
