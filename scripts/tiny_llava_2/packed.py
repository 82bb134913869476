"""What the model says to a batch of packed sequences, and how wrong it is."""

from __future__ import annotations

import torch
from scenes import NAMES
from sequences import PAD, PREFIX, Batch
from shape import patch_features
from torch.nn import functional as F  # noqa: N812  (the field's own name)
from transformers import LlavaForConditionalGeneration

IMAGE_ID = 3
Said = dict[str, torch.Tensor]


def on_device(batch: Batch, device: str) -> Batch:
    return Batch(*(x.to(device, non_blocking=True) for x in batch))


def names_of_patches(
    model: LlavaForConditionalGeneration, head: torch.nn.Linear, batch: Batch
) -> tuple[torch.Tensor, Said]:
    """Loss of naming what is at every patch."""
    return _patch_loss(head, patch_features(model, batch.images), batch)


def losses(
    model: LlavaForConditionalGeneration, head: torch.nn.Linear, batch: Batch, share: float
) -> tuple[torch.Tensor, Said]:
    """Loss of the answers plus a share of that of the patches."""
    features = patch_features(model, batch.images)
    patch, said = _patch_loss(head, features, batch)
    logits, target, weight = answer_logits(model, features, batch)
    each = F.cross_entropy(logits.float(), target, reduction="none")
    answers = (each * weight).sum() / weight.sum()
    right = (logits.argmax(-1) == target).float().mean()
    return answers + share * patch, {"answers": answers.detach(), "right": right, **said}


def _patch_loss(
    head: torch.nn.Linear, features: torch.Tensor, batch: Batch
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
    model: LlavaForConditionalGeneration, features: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [answer tokens of the batch, vocabulary], the ids they should name, their weights."""
    ids = batch.ids
    embeds = model.model.language_model.embed_tokens(ids)
    image = model.model.multi_modal_projector(features).flatten(0, 1)
    embeds = embeds.to(image.dtype).masked_scatter((ids == IMAGE_ID)[..., None], image)
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask(batch).to(embeds.dtype),
        position_ids=batch.position,
        use_cache=False,
    ).last_hidden_state
    answered = batch.kind >= 0
    logits = model.lm_head(hidden[:, :-1][answered[:, 1:]])
    return logits, ids[answered], batch.answer[answered]


def mask(batch: Batch) -> torch.Tensor:
    """[B, 1, queries, keys]: 0 where a token may look, else very negative. It may look at what came
    before it of its own turn, of the turn before in a conversation, and of the pictures."""
    turn, parent = batch.turn, batch.parent
    key, query = turn[:, None, :], turn[:, :, None]
    sees = (key == query) | (key == parent[:, :, None]) | (key == PREFIX)
    sees &= torch.ones(turn.shape[1], turn.shape[1], dtype=torch.bool, device=turn.device).tril()
    sees |= (query == PAD) & torch.eye(turn.shape[1], dtype=torch.bool, device=turn.device)
    return torch.zeros(sees.shape, device=turn.device).masked_fill(~sees, -1e9)[:, None]
