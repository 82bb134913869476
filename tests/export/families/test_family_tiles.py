"""Images with text around and between their tokens, as many as the image asks for: the tiles of
InternVL and SmolVLM, the rows of Pixtral and Mistral 3."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import EXPORTED, FAMILIES, TINY, their_answer
from parity_tools import load_torch
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

import lvlm
from lvlm.core.errors import CheckpointError, ParameterError
from lvlm.export.budgets.sample_prompts import prompt_maker
from lvlm.export.checkpoint.checkpoint import Checkpoint, find_family
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.families.smolvlm import full_tile_places
from lvlm.export.recipes.none import NoCompression
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.prompt.prompts import PromptMaker

TILES = [name for name in TINY if name.startswith(("internvl:", "smolvlm:"))]
NAMES = [*TILES, *(name for name in TINY if name.startswith(("mistral3:", "pixtral:")))]
SHAPES = [(40, 40), (20, 300), (250, 31), (1, 1), (90, 60)]


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in SHAPES]


def maker_of(folder: Path) -> PromptMaker:
    source = Checkpoint(folder, str(folder), None)
    family = find_family(source.config, "")
    return prompt_maker(source, family, family.read_config(source.config))


@pytest.mark.parametrize("name", NAMES)
def test_images_stand_in_the_prompt_as_their_text(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    """The same ids as of the whole text with every image written out, as transformers does."""
    maker = maker_of(checkpoint(name))
    prompt = maker.prepare(
        0,
        "USER: <image>\nLeft.<image> and<image><image>\n\n<image>right? ASSISTANT:",
        images(),
        GenerationOptions(chat_template=False),
    )
    text = "USER: {}\nLeft.{} and{}{}\n\n{}right? ASSISTANT:".format(
        *(image.text for image in prompt.images)
    )
    assert list(prompt.ids) == maker.tokenizer.encode(text)
    counts = [p.tokens for p in prompt.images]
    assert [int((prompt.image_id == m).sum()) for m in range(1, 6)] == counts
    assert ((prompt.image_id > 0) == (np.array(prompt.ids) == 3)).all()
    np.testing.assert_array_equal(prompt.positions, np.arange(len(prompt.ids)))
    assert max(counts) <= maker.images.tokens
    assert len(set(counts)) > 1 or name == "smolvlm:mha-bias-tied"


@pytest.mark.parametrize("name", [name for name in NAMES if name in EXPORTED])
def test_images_of_other_shapes_equal_transformers_generate(
    name: str, checkpoint: Callable[[str], Path], bundle: Callable[..., Path]
) -> None:
    """Rows whose images give different numbers of tokens, alone in transformers."""
    folder, options = checkpoint(name), GenerationOptions(chat_template=False)
    found = images()
    rows = [found[1:3], found[3:], found[4:], found[2:4]]
    texts = [f"USER: {'<image>' * len(row)} What is it? ASSISTANT:" for row in rows]
    theirs, expected = load_torch(folder), []
    with lvlm.load(bundle(name, max_images=2)) as model:
        for text, row in zip(texts, rows, strict=True):
            prompt = model.prepare(0, text, row, options)
            given = TINY[name][0].transformers_inputs(prompt)
            expected.append(their_answer(theirs, prompt.ids, given, max_new_tokens=12))
        got = model.generate(texts, rows, max_new_tokens=12, chat_template=False)
    assert [answer.token_ids for answer in got] == expected


@pytest.mark.parametrize("side", range(1, 41))
def test_positions_of_full_tiles_equal_transformers(side: int) -> None:
    asked: list[torch.Tensor] = []

    class Embeddings(SmolVLMVisionEmbeddings):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.patch_size, self.num_patches_per_side = 1, side
            self.patch_embedding = torch.nn.Identity()
            self.position_embedding = lambda ids: asked.append(ids) or 0

    Embeddings()(torch.zeros(1, 1, side, side), torch.ones(1, side, side, dtype=torch.bool))
    assert asked[0][0].tolist() == full_tile_places(side).tolist()


@pytest.mark.parametrize("name", TILES[:1] + TILES[-2:-1])
def test_fewer_tokens_an_image(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def plan(tokens: int) -> Any:
        output = tmp_path / "out"
        options = ExportOptions(
            str(checkpoint(name)), NoCompression(), output, max_image_tokens=tokens
        )
        return make_plan(options)

    whole = plan(10_000)
    each = whole.images.processor["tile_tokens"]
    assert whole.images.tokens == each * whole.images.max_dims["units"] > 3 * each
    bounded = plan(whole.images.tokens - 1)
    assert bounded.images.tokens == each * bounded.images.max_dims["units"] < whole.images.tokens
    text = bounded.cache.capacity.max_text_len
    assert bounded.cache.capacity.per_layer[0] == text + bounded.images.tokens
    with pytest.raises(ParameterError, match=f"at least {each} tokens"):
        plan(each - 1)


def test_rotary_angles_that_grow_with_the_length_bound_it(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """InternVL's "dynamic": up to max_position_embeddings they are the usual ones."""
    name = "internvl:qwen2-gqa"
    assert TINY[name][1].text_config.rope_parameters["rope_type"] == "dynamic"
    options = ExportOptions(
        str(checkpoint(name)), NoCompression(), tmp_path / "out", max_text_len=32_768
    )
    with pytest.raises(ParameterError, match="attends over 32768 tokens only"):
        make_plan(options)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("internvl", {"vision_config": {"model_type": "clip_vision_model"}}, "vision tower"),
        ("internvl", {"text_config": {"model_type": "gpt_oss"}}, "text backbone 'gpt_oss'"),
        ("internvl", {"vision_feature_layer": -2}, "vision_feature_layer '-2'"),
        ("internvl", {"vision_feature_select_strategy": "full"}, "select_strategy 'full'"),
        ("internvl", {"vision_config": {"image_size": [448, 336]}}, "448 x 336"),
        ("internvl", {"downsample_ratio": 1 / 3}, "3 along each side"),
        ("internvl", {"quantization_config": {"bits": 4}}, "quantized"),
        ("internvl", {"text_config": {"rope_scaling": {"type": "longrope"}}}, "rope_type"),
        ("internvl", {"text_config": {"layer_types": ["sliding_attention"]}}, "layer_types"),
        ("smolvlm", {"vision_config": {"model_type": "siglip_vision_model"}}, "vision tower"),
        ("smolvlm", {"text_config": {"model_type": "qwen2"}}, "text backbone 'qwen2'"),
        ("smolvlm", {"text_config": {"rope_scaling": {"type": "longrope"}}}, "rope_type"),
        ("smolvlm", {"scale_factor": 4, "vision_config": {"patch_size": 37}}, "multiple"),
        ("smolvlm", {"vision_config": {"image_size": [512, 512]}}, "squares are"),
    ],
)
def test_what_is_not_supported_is_named(name: str, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        FAMILIES[name].read_config(change)


@pytest.mark.parametrize("name", TILES[:1] + TILES[-2:-1])
def test_tiles_of_another_size_than_the_towers(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    family, config = TINY[name]
    wrong = json.loads(json.dumps(config.to_dict()))
    side = wrong["vision_config"]["image_size"]
    wrong["vision_config"]["image_size"] = 2 * side if isinstance(side, int) else [2 * side[0]] * 2
    with pytest.raises(CheckpointError, match="image processor makes tiles of"):
        family.images(family.read_config(wrong), checkpoint(name))
