"""Prompts whose images lose tokens before the language model: ids, images and positions."""

from __future__ import annotations

import numpy as np
import pytest

from lvlm.runtime.bundle.manifest import EncoderReduction
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.prompt.prompts import Prompt
from lvlm.runtime.prompt.shortened import placed, shortened
from lvlm.runtime.sampling.settings import Sampling

OWN = EncoderReduction("strided", 1.0, None)
CLOSED = EncoderReduction("strided", 1.0, None, "closed")
IMAGE = 3


def prompt(image_id: list[int], positions: np.ndarray | None = None) -> Prompt:
    numbers = np.array(image_id)
    ids = [IMAGE if number else 10 + place for place, number in enumerate(image_id)]
    images = [
        PreparedImage(
            {"pixels": np.zeros((1, 3), np.float32)}, int(count), np.arange(count)[:, None]
        )
        for count in np.unique(numbers[numbers > 0], return_counts=True)[1]
    ]
    where = np.arange(len(ids)) if positions is None else positions
    return Prompt(ids, numbers, images, where, Sampling(), 8)


def indices(short: Prompt) -> list[np.ndarray]:
    found = []
    for image in short.images:
        assert image.choice is not None
        found.append(image.choice.reduce(np.zeros((image.tokens, 2), np.float32))[0])
    return found


def test_positions_are_their_own() -> None:
    whole = prompt([0, 1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0])
    short = shortened(whole, OWN, 0.5)
    assert short.image_id.tolist() == [0, 1, 1, 1, 0, 0, 2, 2, 0]
    assert short.ids == [10, 3, 3, 3, 17, 18, 3, 3, 23]
    assert [image.tokens for image in short.images] == [6, 4]
    assert short.next_position == whole.next_position == 14
    found = placed(short, [1, 2], indices(short))
    assert found.positions.tolist() == [0, 2, 4, 6, 7, 8, 10, 12, 13]
    assert found.aligned.tolist() == found.positions.tolist()


def test_or_closed_up() -> None:
    short = shortened(prompt([0, 1, 1, 1, 1, 0]), CLOSED, 0.5)
    assert short.positions.tolist() == [0, 1, 2, 3]
    assert short.next_position == 4
    assert placed(short, [1], indices(short)) is short


def test_each_run_keeps_its_share() -> None:
    """Text between an image's tokens stays where it is."""
    short = shortened(prompt([0, 1, 1, 1, 1, 0, 1, 1, 0]), OWN, 0.5)
    assert short.image_id.tolist() == [0, 1, 1, 0, 1, 0]
    assert short.ids == [10, 3, 3, 15, 3, 18]
    assert placed(short, [1], indices(short)).positions.tolist() == [0, 2, 4, 5, 7, 8]


def test_three_positions_stay_with_their_tokens() -> None:
    positions = np.array([[0, 1, 1, 1, 1, 3, 4], [0, 1, 1, 2, 2, 3, 4], [0, 1, 2, 1, 2, 3, 4]])
    whole = prompt([0, 1, 1, 1, 1, 0, 0], positions)
    short = shortened(whole, OWN, 0.5)
    found = placed(short, [1], indices(short))
    assert found.positions.tolist() == [[0, 1, 1, 3, 4], [0, 1, 2, 3, 4], [0, 2, 2, 3, 4]]
    assert found.next_position == 5


def test_what_follows_a_last_image_goes_on_behind_all_of_it() -> None:
    short = shortened(prompt([0, 1, 1, 1, 1]), OWN, 0.25)
    found = placed(short, [1], indices(short))
    assert found.positions.tolist() == [0, 3]
    assert found.next_position == 5


def test_only_some_images_are_known_yet() -> None:
    """Those of a shared beginning are not encoded again."""
    short = shortened(prompt([1, 1, 1, 1, 0, 2, 2, 2, 2, 0]), OWN, 0.5)
    found = placed(short, [2], indices(short)[1:])
    assert found.positions[3:].tolist() == [6, 8, 9]


@pytest.mark.parametrize("reduction", [OWN, CLOSED])
def test_once_and_not_at_1(reduction: EncoderReduction) -> None:
    whole, text = prompt([0, 1, 1, 0]), prompt([0, 0])
    assert shortened(whole, reduction, 1.0) is whole
    assert shortened(text, reduction, 0.5) is text
    short = shortened(whole, reduction, 0.5)
    assert shortened(short, reduction, 0.5) is short


def test_the_digest_says_what_stays() -> None:
    whole = prompt([0, *[1] * 8, 0])
    digests = {
        p.images[0].digest()
        for p in (whole, *(shortened(whole, OWN, ratio) for ratio in (0.25, 0.5)))
    }
    other = EncoderReduction("random", 1.0, None, settings={"seed": 1})
    digests.add(shortened(whole, other, 0.5).images[0].digest())
    assert len(digests) == 4
