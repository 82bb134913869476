"""The model's answers to a batch of packed sequences, and how wrong they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F  # noqa: N812  (the field's own name)
from transformers import LlavaForConditionalGeneration

from lvlm.calibration.datasets.scenes.drawing import NAMES
from tiny_llava.sequences import PAD, PREFIX, SequenceBatch
from tiny_llava.shape import patch_features
from tiny_llava.thinned import IMAGE_ID, Cut, at

Said = dict[str, torch.Tensor]


def on_device(batch: SequenceBatch, device: str) -> SequenceBatch:
    return SequenceBatch(*(x.to(device, non_blocking=True) for x in batch))


def names_of_patches(
    model: LlavaForConditionalGeneration, head: torch.nn.Linear, batch: SequenceBatch
) -> tuple[torch.Tensor, Said]:
    """Loss of naming what is at every patch."""
    return _patch_loss(head, patch_features(model, batch.images), batch)


def losses(
    model: LlavaForConditionalGeneration, head: torch.nn.Linear, batch: SequenceBatch, share: float
) -> tuple[torch.Tensor, Said]:
    """Loss of the answers plus a share of that of the patches."""
    features = patch_features(model, batch.images)
    patch, named = _patch_loss(head, features, batch)
    answers, said = answer_loss(model, features, batch)
    return answers + share * patch, {**said, **named}


def answer_loss(
    model: LlavaForConditionalGeneration,
    features: torch.Tensor,
    batch: SequenceBatch,
    cuts: Sequence[Cut] = (),
) -> tuple[torch.Tensor, Said]:
    """Loss of the answers, with what is missing of the image tokens."""
    logits, target, weight = answer_logits(model, features, batch, cuts)
    each = F.cross_entropy(logits.float(), target, reduction="none")
    answers = (each * weight).sum() / weight.sum()
    right = (logits.argmax(-1) == target).float().mean()
    return answers, {"answers": answers.detach(), "right": right}


def _patch_loss(
    head: torch.nn.Linear, features: torch.Tensor, batch: SequenceBatch
) -> tuple[torch.Tensor, Said]:
    scores = head(features).flatten(0, 1).float()
    name, colour = batch.patch_name.flatten(), batch.patch_colour.flatten()
    # Empty patches are most of them and soon known.
    weight = torch.where(name > 0, 1.0, 0.15)
    names, colours = scores[:, : 1 + len(NAMES)], scores[:, 1 + len(NAMES) :]
    each = F.cross_entropy(names, name, reduction="none")
    each = each + 0.5 * F.cross_entropy(colours, colour, reduction="none")
    right = ((names.argmax(-1) == name) & (name > 0)).sum() / (name > 0).sum()
    return (each * weight).sum() / weight.sum(), {"patches": right}


def answer_logits(
    model: LlavaForConditionalGeneration,
    features: torch.Tensor,
    batch: SequenceBatch,
    cuts: Sequence[Cut] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [answer tokens of the batch, vocabulary], the ids they should name, their weights."""
    text = model.model.language_model
    embeds = text.embed_tokens(batch.ids)
    image = model.model.multi_modal_projector(features).flatten(0, 1)
    hidden = embeds.to(image.dtype).masked_scatter((batch.ids == IMAGE_ID)[..., None], image)
    missing = {cut.block: cut.columns for cut in cuts}
    for number, block in enumerate(text.layers):
        if number in missing:
            columns = missing[number]
            batch = at(batch, columns)
            hidden = hidden.gather(1, columns[..., None].expand(*columns.shape, hidden.shape[-1]))
        if number in missing or number == 0:
            sees = mask(batch).to(hidden.dtype)
            turned = text.rotary_emb(hidden, batch.position)
        hidden = block(hidden, attention_mask=sees, position_embeddings=turned)
    answered = batch.kind >= 0
    logits = model.lm_head(text.norm(hidden)[:, :-1][answered[:, 1:]])
    return logits, batch.ids[answered], batch.answer[answered]


def mask(batch: SequenceBatch) -> torch.Tensor:
    """[B, 1, queries, keys]: 0 where a token may look, else very negative. It may look at what came
    before it of its own turn, of the turn before in a conversation, and of the images."""
    turn, parent = batch.turn, batch.parent
    key, query = turn[:, None, :], turn[:, :, None]
    sees = (key == query) | (key == parent[:, :, None]) | (key == PREFIX)
    sees &= torch.ones(turn.shape[1], turn.shape[1], dtype=torch.bool, device=turn.device).tril()
    sees |= (query == PAD) & torch.eye(turn.shape[1], dtype=torch.bool, device=turn.device)
    return torch.zeros(sees.shape, device=turn.device).masked_fill(~sees, -1e9)[:, None]
