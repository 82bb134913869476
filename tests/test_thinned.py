"""Training tiny-llava on with image tokens missing: what goes, what the rest then says, what is
stored. On a model of the same images that is a hundred times smaller."""

from __future__ import annotations

import itertools
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from settings import SHIPPED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("sklearn") is None, reason="handwritten digits come from scikit-learn"
    ),
]

if TYPE_CHECKING:
    import torch
    from tiny_llava.sequences import Packer, SequenceBatch


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def packer(tokenizer: Any) -> Packer:
    from tiny_llava.sequences import Packer

    return Packer(tokenizer)


@pytest.fixture
def model(tokenizer: Any) -> Any:
    import torch
    from tiny_llava.shape import IMAGE_TOKENS, PATCH, SIDE
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(3)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("mix", ["ONE", "TWO"])
def test_only_image_tokens_go_and_as_many_of_every_image(mix: str, packer: Packer) -> None:
    import torch
    from tiny_llava import sequences
    from tiny_llava.thinned import IMAGE_ID, MIN_SHARE, draw_cuts

    batch = packer.batch((3, 4), 2, getattr(sequences, mix), "train")
    images = 1 if mix == "ONE" else 2
    image = ((batch.ids == IMAGE_ID).cumsum(1) - 1) // 576
    forms = set()
    for seed in range(30):
        cuts = draw_cuts(batch, torch.Generator().manual_seed(seed))
        again = draw_cuts(batch, torch.Generator().manual_seed(seed))
        blocks = [cut.block for cut in cuts]
        assert blocks == sorted(set(blocks)) == [cut.block for cut in again]
        forms.add((0 in blocks, any(blocks)))
        here = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        for cut, same in zip(cuts, again, strict=True):
            assert torch.equal(cut.columns, same.columns)
            assert bool((cut.columns.diff() > 0).all())
            here = here.gather(1, cut.columns)
            left = batch.ids.gather(1, here)
            for row in range(len(batch.ids)):
                text = (batch.ids[row] != IMAGE_ID).nonzero()[:, 0]
                assert torch.equal(here[row][left[row] != IMAGE_ID], text)
                some = image[row].gather(0, here[row])[left[row] == IMAGE_ID]
                counts = some.bincount(minlength=images)
                assert len(set(counts.tolist())) == 1
                assert counts[0] >= round(576 * MIN_SHARE) - 1
    assert forms == {(False, False), (True, False), (False, True), (True, True)}


@pytest.mark.parametrize("blocks", [(0,), (1,), (0, 2)])
def test_what_is_cut_is_what_later_blocks_do_not_see(
    blocks: tuple[int, ...], packer: Packer, model: Any
) -> None:
    """The logits are those of the whole sequence where, from a cut's block on, nobody looks at what
    it took away."""
    import torch
    from tiny_llava.packed import answer_logits
    from tiny_llava.sequences import ONE
    from tiny_llava.shape import patch_features
    from tiny_llava.thinned import IMAGE_ID, Cut

    batch = packer.batch((3, 5), 2, ONE, "train")
    random = torch.rand(batch.ids.shape, generator=torch.Generator().manual_seed(1))
    gone: dict[int, torch.Tensor] = {}
    cuts, here = [], torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
    for number, block in enumerate(blocks):
        stays = (batch.ids != IMAGE_ID) | (_rank(random, batch) >= 200 * (number + 1))
        gone[block] = ~stays
        columns = torch.stack([row.nonzero()[:, 0] for row in stays.gather(1, here)])
        cuts.append(Cut(block, columns))
        here = here.gather(1, columns)
    with torch.no_grad():
        features = patch_features(model, batch.images)
        found, ids, weights = answer_logits(model, features, batch, cuts)
        expected = _masked(model, features, batch, gone)
        whole, _, _ = answer_logits(model, features, batch)
    answered = batch.kind >= 0
    assert torch.equal(ids, batch.ids[answered])
    assert torch.equal(weights, batch.answer[answered])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - whole).abs().max() > 0.1


def _rank(random: torch.Tensor, batch: SequenceBatch) -> torch.Tensor:
    """Of image tokens, in which order they go, from 0 on."""
    import torch

    return torch.where(batch.ids == 3, random, 2.0).argsort(1).argsort(1)


def _masked(
    model: Any, features: torch.Tensor, batch: SequenceBatch, gone: dict[int, torch.Tensor]
) -> torch.Tensor:
    """Logits before every answer token: all tokens go on, those that are ``gone`` from a block on
    are hidden from then on."""
    import torch

    text = model.model.language_model
    image = model.model.multi_modal_projector(features).flatten(0, 1)
    hidden = text.embed_tokens(batch.ids)
    hidden[batch.ids == 3] = image
    angles = text.rotary_emb(hidden, batch.position)
    size = batch.ids.shape[1]
    hide = torch.zeros(len(batch.ids), 1, size, size, dtype=torch.bool)
    for row in range(len(batch.ids)):
        turn, parent = batch.turn[row], batch.parent[row]
        for query in range(size):
            before = torch.arange(size) <= query
            seen = (turn == turn[query]) | (turn == parent[query]) | (turn == -1)
            own = torch.arange(size) == query
            hide[row, 0, query] = ~((before & seen) | own)
    for number, block in enumerate(text.layers):
        if number in gone:
            hide |= gone[number][:, None, None, :]
            hide &= ~torch.eye(size, dtype=torch.bool)
        mask = torch.zeros(hide.shape).masked_fill(hide, -1e9)
        hidden = block(hidden, attention_mask=mask, position_embeddings=angles)
    logits: torch.Tensor = model.lm_head(text.norm(hidden))
    return logits[:, :-1][(batch.kind >= 0)[:, 1:]]


def test_what_is_stored_lies_between_the_start_and_what_was_learned(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed in fp32, rounded once; and a second run goes on from the first."""
    import torch
    from finish_tiny_llava import main
    from tiny_llava.shape import save
    from transformers import LlavaForConditionalGeneration

    start, done = tmp_path / "start", tmp_path / "done"
    save(model, tokenizer, start)
    (start / "training.json").write_text('{"training": {"steps": 7}}')

    monkeypatch.setattr("tiny_llava.held_out.SIZE", 2)
    clock = itertools.count()  # a second between any two looks at it
    monkeypatch.setattr("finish_tiny_llava.time", SimpleNamespace(time=lambda: next(clock)))

    def run(minutes: float, mix: float) -> tuple[dict[str, Any], dict[str, Any]]:
        flags = {"start": start, "output": done, "work": tmp_path / "work", "minutes": minutes}
        flags |= {"mix": mix, "batch": 2, "eval-batches": 1, "peak": 0.05}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr("sys.argv", ["finish", *words])
        main()
        report = json.loads((done / "training.json").read_text())
        stored = LlavaForConditionalGeneration.from_pretrained(done, dtype=torch.float16)
        return report, stored.state_dict()

    def learned() -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = torch.load(tmp_path / "work/fewer.pt")["model"]
        return state

    before = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32).state_dict()
    report, stored = run(0.1, 0.6)
    assert report["training"]["steps"] == 7
    steps = report["training"]["fewer"]["steps"]
    assert steps == 2
    after, tower = learned(), "vision_tower"
    for name, value in before.items():
        assert torch.equal(after[name], value) == (tower in name), name
        between = 0.4 * value.double() + 0.6 * after[name].double()
        assert bool(((stored[name].double() - between).abs() <= _half_a_step(between)).all()), name
    report, stored = run(0.3, 1.0)
    assert report["training"]["fewer"]["steps"] > steps
    assert report["answers"] > 0
    for name, value in learned().items():
        assert torch.equal(stored[name], value.half()), name


def _half_a_step(values: torch.Tensor) -> torch.Tensor:
    """How far fp16 is from each of ``values`` at most, with a little for fp32's own rounding."""
    return 0.5001 * 2.0 ** ((values.frexp().exponent - 1).clamp(min=-14) - 10).double()
