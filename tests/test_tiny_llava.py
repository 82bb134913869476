"""What tiny-llava was trained with, and that it is what is shipped."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from settings import SHIPPED

from lvlm.calibration.datasets.scenes.drawing import (
    CELL,
    COUNTS,
    DENSITIES,
    PLACES,
    Density,
    Scene,
    draw_scene,
)
from lvlm.calibration.datasets.scenes.questions import KINDS, ask, said

pytestmark = pytest.mark.skipif(
    find_spec("sklearn") is None, reason="handwritten digits come from scikit-learn"
)

if TYPE_CHECKING:
    from tiny_llava.sequences import SequenceBatch


@pytest.fixture(params=DENSITIES)
def scene(request: pytest.FixtureRequest) -> Scene:
    return draw_scene(np.random.default_rng(4), "heldout", request.param)


@pytest.mark.parametrize("density", DENSITIES)
def test_things_lie_in_their_cells(density: Density) -> None:
    for seed in range(20):
        drawn = draw_scene(np.random.default_rng(seed), "train", density)
        assert COUNTS[density][0] <= len(drawn.things) <= COUNTS[density][1]
        for thing in drawn.things:
            left, top, right, bottom = thing.box
            assert thing.place % 3 == left // CELL == (right - 1) // CELL
            assert thing.place // 3 == top // CELL == (bottom - 1) // CELL
            part = drawn.image[top:bottom, left:right].astype(int)
            assert part.max() > drawn.image[:4, :4].max()  # it can be seen


def test_answers_say_what_is_there(scene: Scene) -> None:
    names = {t.place: said(t) for t in scene.things}
    colours = [t.colour for t in scene.things]
    for seed in range(40):
        rng = np.random.default_rng(seed)
        ((question, answer),) = ask((scene,), "count", rng)
        asked = re.fullmatch(r"How many things are (\w+)\?", question)
        if asked:
            count = colours.count(asked[1])
        else:
            found = re.fullmatch(r"How often does the (?:word )?(\w+) appear\?", question)
            assert found is not None
            count = list(names.values()).count(found[1])
        assert answer.endswith(f" In all {count}.")
        ((question, answer),) = ask((scene,), "where", rng)
        found = re.fullmatch(r"Where is the (?:word )?(\w+)\?", question)
        assert found is not None
        places = [place for place, name in names.items() if name == found[1]]
        assert answer == (f"at the {PLACES[places[0]]}" if places else "nowhere")
        first, second = ask((scene,), "turns", rng)
        if second[0] == "Which colour is it?":
            about = re.search(r"(?:at|is) the (?:word )?([\w ]+)\?", first[0])
            assert about is not None
            thing = next(t for t in scene.things if about[1] in (said(t), PLACES[t.place]))
            assert second[1] == thing.colour


def test_every_kind_is_a_function_of_the_seed(scene: Scene) -> None:
    for kind in KINDS:
        one, other = (ask((scene, scene), kind, np.random.default_rng(6)) for _ in range(2))
        assert one == other


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(SHIPPED, dtype="float32")
    return model.eval(), AutoProcessor.from_pretrained(SHIPPED)


@pytest.mark.parity
@pytest.mark.parametrize("mix", ["ONE", "TWO"])
def test_a_packed_question_is_the_prompt_of_the_template(trained: Any, mix: str) -> None:
    """Its answer's logits are those of transformers' own model on the conversation alone."""
    import torch
    from tiny_llava import sequences
    from tiny_llava.packed import answer_logits
    from tiny_llava.shape import patch_features

    model, processor = trained
    packer = sequences.Packer(processor.tokenizer)
    batch = packer.batch((7, 8), 1, getattr(sequences, mix), "heldout")
    with torch.no_grad():
        packed, _, _ = answer_logits(model, patch_features(model, batch.images), batch)
    turn = batch.turn[0]
    of_answers = turn[batch.kind[0] >= 0]
    parent = {int(t): int(batch.parent[0][turn == t][0]) for t in of_answers.unique()}
    second = next((t for t in parent if parent[t] >= 0), 0)  # of a conversation
    assert mix == "TWO" or second > 0
    for number in {0, second}:
        inputs, answer = _conversation(processor, batch, number, parent[number])
        count = int((of_answers == number).sum())
        with torch.no_grad():
            alone = model(**inputs).logits[0, -count - 1 : -1]
        assert (
            inputs["input_ids"][0, -count:].tolist()
            == batch.ids[0][turn == number][-count:].tolist()
        )
        torch.testing.assert_close(packed[of_answers == number], alone, atol=1e-3, rtol=1e-4)
        assert answer


def _conversation(
    processor: Any, batch: SequenceBatch, number: int, parent: int
) -> tuple[Any, str]:
    """Inputs of turn ``number`` after its parent with its answer at the end, and that answer."""
    from PIL import Image

    def said_in(turn: int) -> tuple[str, str]:
        text = processor.tokenizer.decode(batch.ids[0][batch.turn[0] == turn])
        question, _, answer = text.removeprefix("USER: ").partition(" ASSISTANT:")
        return question, answer

    messages: list[dict[str, Any]] = []
    if parent >= 0:
        question, answer = said_in(parent)
        told = answer.removeprefix(" ").removesuffix("</s>")
        messages = [_message("user", question), _message("assistant", told)]
    question, answer = said_in(number)
    messages.append(_message("user", question))
    messages[0]["content"] = [{"type": "image"}] * len(batch.images) + messages[0]["content"]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [Image.fromarray(image.numpy()) for image in batch.images]
    return processor(text=text + answer, images=images, return_tensors="pt"), answer


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


@pytest.mark.slow
def test_the_trained_model_reads_a_held_out_image(trained: Any, scene: Scene) -> None:
    from PIL import Image

    model, processor = trained
    message = _message("user", "Read everything.")
    message["content"].insert(0, {"type": "image"})
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.fromarray(scene.image)], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    told = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert told.strip() == ", ".join(said(t) for t in scene.things)
