"""The judge of an export has every family's checkpoints as transformers has them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import TINY, USUAL
from parity_tools import IMAGES
from PIL import Image

from lvlm.core.errors import ValidationError
from lvlm.export.budgets.sample_prompts import prompt_maker
from lvlm.export.checkpoint.checkpoint import Checkpoint
from lvlm.export.verify import model_inputs
from lvlm.export.verify.judge import Judge

ONE_OF_EACH = [name for name in USUAL if name.split(":")[0] != "llava"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_inputs_of_every_family_are_transformers_own(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    """Pixels, chat template, ids: what is compared before anything is computed."""
    (family, config), folder = TINY[name], checkpoint(name)
    maker = prompt_maker(Checkpoint(folder, "", None), family, config)
    image, judge = Image.fromarray(IMAGES[0]), Judge(folder)
    judge.load_model(torch.float32)
    outcome = model_inputs.compare(
        judge, family, maker, image, model_inputs.prepare(maker, image), True
    )
    pixels = {"pixels of an image", "pixels of one of another shape"}
    if judge.images is None:  # some are there for torchvision alone
        assert judge.no_images.endswith("needs torchvision")
        assert name.startswith("lfm2-vl")
        pixels = {"prompt's ids, image aside"}
    assert pixels <= {c.name for c in outcome.checks}
    assert [check.name for check in outcome.checks if not check.passed] == []


def test_pixtral_s_processor_asks_for_its_own_patches(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whatever its image processor's file says, where its own names patches alone, or nothing."""
    folder = Path(shutil.copytree(checkpoint("pixtral:mha-layers-tied"), tmp_path / "checkpoint"))
    file = folder / "processor_config.json"
    given = json.loads(file.read_text())
    del given["spatial_merge_size"]
    for patch in (10, None):
        file.write_text(json.dumps({k: v for k, v in given.items() if patch or k != "patch_size"}))
        assert Judge(folder).image_options == {"patch_size": patch or 16}


def test_an_answer_that_transformers_cannot_give(checkpoint: Callable[[str], Path]) -> None:
    """Its Mistral 3 fails on one image of one token."""
    judge = Judge(checkpoint("mistral3:gqa"))
    judge.load_model(torch.float32)
    pixels = judge.pixels(Image.fromarray(np.zeros((9, 9, 3), np.uint8)))
    with pytest.raises(ValidationError, match=r"an image of 1 tokens: .*--no-validate"):
        judge.answer([1, judge.image_id, 9], pixels, {judge.image_id}, 4, lambda _: None)
