"""What an export records of its bundle's answers, whatever the recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import lvlm
from lvlm.export.verify import model_inputs, validation
from lvlm.export.verify.recording import record
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.tools.recorded_answers import compare


@pytest.mark.parametrize("recipe", ["none", "divprune", "random"])
def test_the_bundle_answers_so(recipe: str, bundle: Callable[..., Path]) -> None:
    """Also where image tokens are dropped before the language model: the record is of the whole
    prompt."""
    folder = bundle("digits-llava", recipe, max_images=2)
    manifest = read_bundle(folder)
    maker = validation._prompt_maker(folder, manifest)
    name = validation.IMAGE
    prompt = model_inputs.prepare(maker, validation._image(name), 4, template=False)
    answer = record(folder, manifest, name, prompt, (9, 10, 11), {}, template=False)
    assert answer.ids.count(manifest.images.token_id) == manifest.images.tokens
    with lvlm.load(folder) as model:
        (found,) = compare(model, [answer])
    assert found.passed, found
