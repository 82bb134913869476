"""What tokens see, where that is not everything up to themselves: as transformers masks it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, eager_attention_forward
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


@pytest.mark.parametrize("window", [2, 40])
def test_all_of_a_prompt_sees_all_of_it_as_in_paligemma(window: int) -> None:
    """A window hides nothing of it."""
    config = Gemma2Config(sliding_window=window, attn_implementation="eager")
    image_id = torch.tensor(ROWS)
    given = {
        "config": config,
        "inputs_embeds": torch.zeros(*image_id.shape, 4),
        "attention_mask": (image_id >= 0).long(),
        "past_key_values": None,
        "position_ids": torch.arange(image_id.shape[1])[None],
        "block_sequence_ids": torch.zeros_like(image_id),
    }
    masks, valid = Masks(bidirectional="prompt"), image_id >= 0
    for own, make in ((None, create_causal_mask), (window, create_sliding_window_causal_mask)):
        ours = masks.of(own, image_id)
        assert ours is not None
        assert torch.equal(ours[:, 0][valid], (make(**given)[:, 0] == 0)[valid])
    ends = masks.ends(image_id)
    assert ends is not None
    assert ends[:, [0, 8, 11]].tolist() == [[11, 11, 11], [8, 8, -1], [11, 11, 11]]


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


def gemma_2(cap: float | None) -> Gemma2Attention:
    config = Gemma2Config(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=2,
        attn_logit_softcapping=cap,
        attn_implementation=ATTENTION,
    )
    return Gemma2Attention(config, 0)


def test_capped_logits_go_with_a_mask_alone() -> None:
    """A causal attention that caps would be traced as one that does not."""
    angles = torch.ones(1, 3, 8), torch.zeros(1, 3, 8)
    with pytest.raises(CheckpointError, match="Gemma2Attention attends with softcap without a"):
        gemma_2(50.0)(torch.zeros(1, 3, 16), angles, None)
    gemma_2(None)(torch.zeros(1, 3, 16), angles, None)


def test_capped_attention_is_that_of_transformers() -> None:
    """Where the cap matters, and what is hidden would be seen if it were masked before."""
    random = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(2, 4, 5, 8, generator=random)
    key, value = torch.randn(2, 2, 2, 7, 8, generator=random)
    mask = torch.rand(2, 1, 5, 7, generator=random) < 0.6
    mask[..., 0] = True
    hidden = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    module = gemma_2(0.7)
    options = {"scaling": 0.5, "softcap": 0.7}
    expected, _ = eager_attention_forward(module, query, key, value, hidden, **options)
    tap = Tap()
    found, _ = attention(module, query, key, value, mask, tap=tap, **options)
    torch.testing.assert_close(found, expected)
    assert tap.logits == {"scale": 0.5, "softcap": 0.7}
    plain, _ = attention(module, query, key, value, mask, scaling=0.5)
    assert (plain - expected).abs().max() > 0.1
