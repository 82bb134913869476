"""The graph ``extend``: several new tokens per row behind a cache that is there already.

For recipes whose entries depend on nothing but the tokens before them: the rest of a prompt after
what it shares with another, a long prompt piece by piece, the next turn of a conversation.
"""

from __future__ import annotations

import torch
from torch import nn

from lvlm.export.graphs.attending import Angles, seen_among
from lvlm.export.graphs.blocks import EntriesBehind, run_block
from lvlm.export.graphs.embedded import EmbeddedTokens, new_tokens
from lvlm.export.graphs.graph import Tensors
from lvlm.export.graphs.language_graph import LanguageGraph, logits_at, parts_of
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.repeats import like, repeated
from lvlm.export.ports import BATCH, GraphPort
from lvlm.export.standard_ops import Tap


class Extend(LanguageGraph):
    """New tokens to the next logits, writing every layer's cache from each row's own slot on.

    input_ids       [B,T] int64, padded on the right
    image_features  [R,(1+deepstack_layers)*D]: of the images that new tokens stand for; one row of
                    zeros if there is none
    image_row       [B,T] int64: the row of these that replaces a placeholder, -1 for text and
                    padding
    position_ids    [B,T] int64, or [3,B,T]
    last_token      [B] int64: index of each row's last new token that is no padding
    image_id        [B,T] int64, where tokens of an image see one another: as in prefill.py. All of
                    an image's tokens are among them, or none that follows
    write_index     [B] int64: how many entries a row has, hence the slot of its first new one;
                    slots up to write_index + T are written, those of padding, too
    past_slots      [P] int64: the slots before that are attended to, 0 up to the largest
                    write_index; of a row with fewer entries those only. Slot 0, if no row has any
    and the buffers, and the states, of rows with entries those after the last of these.
    -> logits [B,vocabulary] fp32 after each row's last token, the buffers, the states
    """

    name = "extend"

    def __init__(self, model: LanguageModel, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
        super().__init__(model, None, cache_dtype)
        self.parts = parts_of(model)
        self.dtype = dtype

    def inputs(self) -> list[GraphPort]:
        images = [GraphPort("image_id", torch.int64, (BATCH, "tokens"))]
        return [
            *new_tokens(self.model, self.dtype),
            *(images if self.model.bidirectional else []),
            GraphPort("write_index", torch.int64, (BATCH,)),
            GraphPort("past_slots", torch.int64, ("entries",)),
            *self.buffer_ports("past", self.kinds),
            *self.state_ports("past"),
        ]

    def outputs(self) -> list[GraphPort]:
        return [
            GraphPort("logits", torch.float32, (BATCH, self.model.vocab)),
            *self.buffer_ports("present", self.kinds),
            *self.state_ports("present"),
        ]

    def compute(self, given: Tensors) -> dict[str, torch.Tensor]:
        model, positions = self.model, given["position_ids"]
        embedded = EmbeddedTokens(model, given)
        hidden, angles = embedded.hidden, Angles()
        index, slots = given["write_index"], given["past_slots"]
        masks = {
            window: seen_behind(index, slots, hidden.shape[1], window, given.get("image_id"))
            for window in dict.fromkeys(one.window for one in model.layers)
        }
        outputs: dict[str, torch.Tensor] = {}
        states: list[Tensors] = []
        last = given["last_token"]
        for layer, one in model.numbered():
            if one.states:
                hidden, state = self.stateful(layer, one, hidden, given, last=last, before=index)
                states.append(state)
                continue
            cos, sin = angles.of(one.rotary, hidden, positions)
            turned = {"positions": positions, "cos": cos, "sin": sin, "mask": masks[one.window]}
            own = self.past(layer, given)
            taken = {"hidden": hidden, **turned, "start": index, "slots": slots, **own}
            described = {name: like(taken[name]) for name in ("hidden", *own)}
            written = repeated(_block, one.block, taken, described)
            hidden = embedded.with_features(layer, written.pop("hidden"))
            outputs |= self.present(layer, written)
        outputs |= self.stored(given, states, torch.zeros_like(index))
        outputs["logits"] = logits_at(model, hidden, given["last_token"])
        return outputs


def seen_behind(
    index: torch.Tensor,
    slots: torch.Tensor,
    new: int,
    window: int | None,
    image_id: torch.Tensor | None,
) -> torch.Tensor:
    """Boolean [B,1,T,P+T]: which entries, those there and then the new ones, a token sees."""
    past = (slots[None] < index[:, None])[:, None]  # [B,1,P]
    if window is not None:
        here = index[:, None] + torch.arange(new, device=index.device)  # slots of new tokens [B,T]
        past = past.logical_and(here[:, :, None] - slots < window)
    own = seen_among(new, window, image_id, index)
    rows = index.shape[0]
    return torch.cat([past.expand(-1, new, -1), own.expand(rows, -1, -1)], dim=2)[:, None]


def _block(
    block: nn.Module,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: torch.Tensor,
    start: torch.Tensor,
    slots: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """A block on each row's new tokens, and its buffers with their entries."""
    cache = EntriesBehind(key, value, start, slots)
    hidden = run_block(block, hidden, positions, (cos, sin), cache, Tap(), mask)
    return {"hidden": hidden, "key": cache.key, "value": cache.value}
