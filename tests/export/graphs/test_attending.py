"""What tokens see, where that is not everything up to themselves: as transformers masks it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gemma3.modeling_gemma3 import (
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)

from lvlm.core.errors import CheckpointError
from lvlm.export.graphs.attending import Masks
from lvlm.export.graphs.extend import seen_behind
from lvlm.export.leaves import ATTENTION
from lvlm.export.recipes.parts.cache_rule import CacheRule
from lvlm.export.recipes.parts.sequence import TokenSequence
from lvlm.export.recipes.snapkv import SnapKV
from lvlm.export.standard_ops import OTHER_LOGITS, Tap, attention

# Text, images of several lengths with text between, padding
ROWS = [
    [0, 0, 1, 1, 1, 1, 0, 2, 2, 0, 0, 3],
    [1, 1, 1, 1, 1, 1, 0, 0, 0, -1, -1, -1],
    [0] * 12,
]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 40])
def test_masks_are_those_of_transformers(window: int) -> None:
    config = Gemma3TextConfig(
        num_hidden_layers=2,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"],
        attn_implementation="eager",
    )
    for row in ROWS:
        image_id = torch.tensor([row])
        places = torch.arange(len(row))[None]
        theirs = create_masks_for_vision_model(
            config,
            torch.zeros(1, len(row), 4),
            (image_id >= 0).long(),
            None,
            places,
            get_block_sequence_ids_for_mask((image_id > 0).long()),
        )
        masks = Masks(bidirectional="image")
        valid = image_id[0] >= 0
        for kind, own in (("sliding_attention", window), ("full_attention", None)):
            ours = masks.of(own, image_id)
            assert ours is not None
            assert torch.equal(ours[0, 0][valid], (theirs[kind][0, 0] == 0)[valid])
        ends = masks.ends(image_id)
        assert ends is not None
        last = [max(np.flatnonzero(seen)) for seen in (theirs["full_attention"][0, 0] == 0).numpy()]
        assert torch.equal(ends[0][valid], torch.tensor(last)[valid])


def test_a_chunk_sees_what_it_sees_of_the_whole() -> None:
    """Cut anywhere but in an image, behind entries that are there."""
    image_id = torch.tensor([ROWS[0]])
    for window in (None, 3):
        whole = Masks(bidirectional="image").of(window, image_id)
        assert whole is not None
        for cut in (1, 2, 6, 7, 9, 11):
            index, slots = torch.tensor([cut]), torch.arange(cut)
            found = seen_behind(index, slots, len(ROWS[0]) - cut, window, image_id[:, cut:])
            assert torch.equal(found, whole[:, :, cut:])


def test_queries_of_images_that_rank_entries_see_what_follows() -> None:
    """The last queries of a prompt: of no image, of one in its middle; of one that is shorter."""
    image_id = torch.tensor([[0, 1, 1, 1, 0, 0, -1], [2, 2, -1, -1, -1, -1, -1]])
    hidden, masks = torch.zeros(2, 7, 4), Masks(bidirectional="image")
    rule = SnapKV().cache_rule()
    assert isinstance(rule, CacheRule)
    tap = Tap()
    tap.query = torch.arange(14.0).reshape(2, 1, 7, 1)
    for ends, expected in (
        (masks.ends(image_id), [[3, 3, 4, 5], [-1, -1, 1, 1]]),
        (None, [[2, 3, 4, 5], [-1, -1, 0, 1]]),
    ):
        state = TokenSequence(hidden, torch.arange(7).expand(2, -1), image_id, ends=ends)
        queries, seen = rule.window(state, tap, 4)
        assert seen.tolist() == expected
        assert queries[0, 0, :, 0].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("name", OTHER_LOGITS)
def test_attention_of_other_logits_is_refused(name: str) -> None:
    x = torch.zeros(1, 1, 2, 4)
    assert attention(torch.nn.Identity(), x, x, x, None, **{name: None})[0].shape == (1, 2, 1, 4)
    with pytest.raises(CheckpointError, match=f"Identity attends with {name}, which"):
        attention(torch.nn.Identity(), x, x, x, None, **{name: 50.0})


def test_gemma_2_would_give_its_cap_to_attention() -> None:
    """By the name that is refused."""
    config = Gemma2Config(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attn_implementation=ATTENTION,
    )
    layer = Gemma2Attention(config, 0)
    angles = torch.ones(1, 3, 8), torch.zeros(1, 3, 8)
    with pytest.raises(CheckpointError, match="Gemma2Attention attends with softcap"):
        layer(torch.zeros(1, 3, 16), angles, None)
