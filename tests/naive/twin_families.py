"""Twins of families whose prompts have every token of an image in their text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor
from twin_model import Layer, QwenTwin, Sequence, Twin

IMAGE = "<image>"  # of tiny checkpoints


class WrittenTwin(Twin):
    """A checkpoint whose prompts have all tokens of an image written into them."""

    def _embed(self, prompt: str, images: list[Any]) -> Sequence:
        inputs = self._inputs(prompt, images)
        ids, owner, runs = inputs["input_ids"][0], [], 0
        hidden = self.model.get_input_embeddings()(ids)
        is_image = (ids == self.model.config.image_token_id).tolist()
        if images:
            hidden[is_image] = torch.cat(self._rows(inputs))
        for place, found in enumerate(is_image):
            runs += found and not self._goes_on(is_image, place)
            owner.append(runs if found else 0)
        return Sequence(hidden, torch.arange(len(ids))[None], owner)

    def _inputs(self, prompt: str, images: list[Any]) -> Mapping[str, Any]:
        """Those of the model."""
        raise NotImplementedError

    def _rows(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Those of every image, [V,D]."""
        raise NotImplementedError

    def _goes_on(self, is_image: list[bool], place: int) -> bool:
        """Whether the token at ``place`` is of the image that one before it is of."""
        return place > 0 and is_image[place - 1]


class PixtralTwin(WrittenTwin):
    """Mistral 3 and Pixtral: an image in rows, a token of text after each. Their processor's class
    needs torchvision, so the rows are written here."""

    def _inputs(self, prompt: str, images: list[Any]) -> Mapping[str, Any]:
        config = self.model.config
        side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
        size = {"height": side, "width": side}
        found = dict(self.images(images, patch_size=size, return_tensors="pt") if images else {})
        parts = prompt.split(IMAGE)
        text = parts[0]
        for part, (height, width) in zip(parts[1:], found.get("image_sizes", []), strict=True):
            row = IMAGE * (int(width) // side)
            text += "[IMG_BREAK]".join([row] * (int(height) // side)) + "[IMG_END]" + part
        return found | {"input_ids": self.tokenizer(text, return_tensors="pt").input_ids}

    def _rows(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        found = self.model.get_image_features(
            inputs["pixel_values"], image_sizes=inputs["image_sizes"]
        )
        return list(found.pooler_output)

    def _goes_on(self, is_image: list[bool], place: int) -> bool:
        return any(is_image[max(0, place - 2) : place])


class GemmaTwin(WrittenTwin):
    """Gemma 3: windows, and tokens of an image that see one another."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.processor: Any = AutoProcessor.from_pretrained(folder)

    def _inputs(self, prompt: str, images: list[Any]) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.processor(
            text=prompt, images=images or None, return_tensors="pt"
        )
        return found

    def _rows(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        return list(self.model.get_image_features(inputs["pixel_values"]).pooler_output)

    def _angles(self, block: Any, hidden: torch.Tensor, place: torch.Tensor) -> Any:
        return self.text.rotary_emb(hidden, place, self._kind(block))

    def _kind(self, block: Any) -> str:
        return str(self.text.config.layer_types[block.layer_idx])

    def _mask(self, block: Any, image: list[int], layer: Layer | None) -> torch.Tensor | None:
        before = 0 if layer is None else layer.key.shape[1]
        mask = torch.full((len(image), before + len(image)), float("-inf"))
        window = mask.shape[1]
        if self._kind(block) == "sliding_attention":
            window = self.text.config.sliding_window
        for row, owner in enumerate(image):
            for column in range(mask.shape[1]):
                behind = before + row - column
                of_one = layer is None and owner > 0 and image[column] == owner
                if behind < window and (behind >= 0 or of_one):
                    mask[row, column] = 0
        return mask


class PaliGemmaTwin(GemmaTwin):
    """PaliGemma: all tokens of a prompt see one another, whatever the window, which is for what
    follows; positions from 1 on, capped logits. Its processor takes no prompt without an image."""

    def _inputs(self, prompt: str, images: list[Any]) -> Mapping[str, Any]:
        if images:
            return super()._inputs(prompt, images)
        text = f"{self.tokenizer.bos_token}{prompt}\n"
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return {"input_ids": ids}

    def _embed(self, prompt: str, images: list[Any]) -> Sequence:
        found = super()._embed(prompt, images)
        return Sequence(found.hidden, found.positions + 1, found.image)

    def _rows(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        return list(self.model.get_image_features(inputs["pixel_values"]).pooler_output)

    def _angles(self, block: Any, hidden: torch.Tensor, place: torch.Tensor) -> Any:
        del block
        return self.text.rotary_emb(hidden, place)

    def _kind(self, block: Any) -> str:
        kinds = getattr(self.text.config, "layer_types", None)
        return str(kinds[block.self_attn.layer_idx]) if kinds else "full_attention"

    def _mask(self, block: Any, image: list[int], layer: Layer | None) -> torch.Tensor | None:
        return None if layer is None else super()._mask(block, image, layer)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        found = super()._logits(hidden)
        cap = getattr(self.text.config, "final_logit_softcapping", None)
        return found if cap is None else cap * torch.tanh(found / cap)


class DeltaTwin(QwenTwin):
    """Qwen3.5: most layers remember by a matrix for each head, written to token by token."""

    def _remember(
        self, block: Any, hidden: torch.Tensor, memory: Any | None
    ) -> tuple[torch.Tensor, Any]:
        net, rows = block.linear_attn, []
        keys, values = net.num_k_heads, net.num_v_heads
        inputs, matrices = memory or (
            [torch.zeros(net.conv_dim)] * (net.conv_kernel_size - 1),
            [torch.zeros(net.head_v_dim, net.head_k_dim) for _ in range(values)],
        )
        for token in block.input_layernorm(hidden):
            inputs = [*inputs, net.in_proj_qkv(token)]
            mixed = torch.zeros(net.conv_dim)
            for back, one in enumerate(reversed(inputs)):
                mixed += one * net.conv1d.weight[:, 0, -1 - back]
            inputs = inputs[1:]
            mixed = mixed / (1 + (-mixed).exp())
            query, key, value = mixed.split([net.key_dim, net.key_dim, net.value_dim])
            fades = torch.log1p((net.in_proj_a(token) + net.dt_bias).exp()) * net.A_log.exp()
            rates = 1 / (1 + (-net.in_proj_b(token)).exp())
            read = []
            for head in range(values):
                own = head // (values // keys)
                asked, found = (x.view(keys, -1)[own] for x in (query, key))
                asked, found = (x / (x.square().sum() + 1e-6).sqrt() for x in (asked, found))
                held = matrices[head] * (-fades[head]).exp()
                wrong = value.view(values, -1)[head] - held @ found
                matrices[head] = held + rates[head] * torch.outer(wrong, found)
                read.append(matrices[head] @ asked / net.head_k_dim**0.5)
            spread = torch.stack(read)
            spread = (
                spread / (spread.square().mean(1, keepdim=True) + net.norm.variance_epsilon).sqrt()
            )
            gate = net.in_proj_z(token)
            rows.append(
                net.out_proj((net.norm.weight * spread).flatten() * gate / (1 + (-gate).exp()))
            )
        hidden = hidden + torch.stack(rows)
        return hidden + block.mlp(block.post_attention_layernorm(hidden)), (inputs, matrices)
