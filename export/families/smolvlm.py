"""SmolVLM 2: SigLIP tower, pixel shuffle, one linear layer, Llama text; tiles named in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionAttention

from lvlm.core.errors import CheckpointError
from lvlm.export.families.parts.leaf_tables import TEXTS, Kinds, leaves
from lvlm.export.families.parts.llama_text import (
    added_token,
    heads,
    language_model,
    preprocessor,
    read_common,
    tiny,
    tiny_tokenizer,
    token_text,
    video_preprocessor,
)
from lvlm.export.families.parts.pixel_values import PixelValues
from lvlm.export.families.parts.whole_tiles import fewer_tiles, tile_images
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.repeats import run_layer
from lvlm.export.leaves import Attention
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.processors.parts.frames import attempted
from lvlm.runtime.processors.parts.smolvlm_video import video_config
from lvlm.runtime.processors.smolvlm import max_tokens, normalise_config, with_max_tokens
from lvlm.runtime.prompt.prompts import Prompt

OWN_TEXTS: Kinds = {"llama": TEXTS["llama"]}
OWN_TOWERS: Kinds = {"smolvlm_vision": {SmolVLMVisionAttention: Attention(turn=None)}}


class SmolVLM(PixelValues):
    """See Family. Tiles and a thumbnail; several patches make one token."""

    name = "smolvlm"
    aliases: ClassVar[Mapping[str, str]] = {
        "smolvlm": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "smolvlm-256m": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        "smolvlm-2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    }
    model_types = ("smolvlm",)
    image_handling = "tiles, and the whole as one more"
    video = "a tile per frame, with its time"
    leaves = leaves(OWN_TEXTS, OWN_TOWERS)
    model_class = SmolVLMForConditionalGeneration

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        config = read_common(
            self.name, SmolVLMConfig, raw, OWN_TEXTS, "llama", OWN_TOWERS, "smolvlm_vision"
        )
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        if not isinstance(side, int) or not isinstance(patch, int):
            raise CheckpointError(
                f"tiles of {side} pixels in patches of {patch} are not supported; squares are"
            )
        if side // patch % config.scale_factor:
            raise CheckpointError(
                f"{side // patch} patches along a tile are no multiple of the scale_factor "
                f"{config.scale_factor}"
            )
        return config

    def language(self, model: Any, config: SmolVLMConfig) -> LanguageModel:
        return language_model(self, model.model.text_model, model.lm_head, config.text_config)

    def vision(self, model: Any, config: SmolVLMConfig) -> nn.Module:
        return SmolVLMVision(model, config)

    def transformers_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        return {name: tensor[None] for name, tensor in super().transformers_inputs(prompt).items()}

    def images(self, config: SmolVLMConfig, folder: Path) -> Images:
        side = config.vision_config.image_size
        along = side // config.vision_config.patch_size // config.scale_factor
        token = token_text(folder, config.image_token_id)
        processor = normalise_config(
            preprocessor(folder),
            along * along,
            token,
            added_token(folder, "fake_image_token", "<fake_token_around_image>"),
            added_token(folder, "global_image_token", "<global-img>"),
            attempted(
                lambda: video_config(video_preprocessor(folder), config.image_token_id, side)
            ),
        )
        if processor["side"] != side:
            raise CheckpointError(
                f"the image processor makes tiles of {processor['side']} pixels, the vision tower "
                f"takes {side}; make max_image_size and image_size equal"
            )
        return tile_images(token, config.image_token_id, (side, side), processor, max_tokens)

    def bounded(self, images: Images, tokens: int) -> Images:
        return fewer_tiles(images, tokens, with_max_tokens, max_tokens)

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """GQA and MHA, biases, tied weights, several tiles and one, factors of the shuffle."""
        size: dict[str, Any] = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 112}
        vision: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80}
        yield (
            "gqa-tiles",
            tiny(
                SmolVLMConfig,
                LlamaConfig(**size, num_hidden_layers=4, **heads(4, 2, 24)),
                SmolVLMVisionConfig(
                    **vision,
                    num_hidden_layers=3,
                    num_attention_heads=3,
                    image_size=48,
                    patch_size=6,
                ),
                image_token_id=3,
                scale_factor=4,
            ),
        )
        yield (
            "mha-bias-tied",
            tiny(
                SmolVLMConfig,
                LlamaConfig(**size, num_hidden_layers=3, **heads(2, 2, 24), attention_bias=True),
                SmolVLMVisionConfig(
                    **vision,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    image_size=112,
                    patch_size=8,
                ),
                image_token_id=3,
                scale_factor=2,
                tie_word_embeddings=True,
            ),
        )

    def tiny_files(self, config: SmolVLMConfig) -> dict[str, str]:
        side, grid = config.vision_config.image_size, range(1, 4)
        processor = {
            "image_processor_type": "SmolVLMImageProcessor",
            "do_image_splitting": side < 100,
            "size": {"longest_edge": 3 * side},
            "max_image_size": {"longest_edge": side},
            "video_sampling": {
                "fps": 2,
                "max_frames": 6,
                "video_size": {"longest_edge": 2 * side},
            },
        }
        places = [f"<row_{row}_col_{column}>" for row in grid for column in grid]
        return {
            "preprocessor_config.json": json.dumps(processor),
            "tokenizer.json": tiny_tokenizer("<fake_token_around_image>", "<global-img>", *places),
        }


class SmolVLMVision(nn.Module):
    """Tower, pixel shuffle, projection: tiles [units,3,S,S] -> rows [units * tile tokens,D]."""

    def __init__(self, model: Any, config: SmolVLMConfig) -> None:
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector
        vision = config.vision_config
        self.places = full_tile_places(vision.image_size // vision.patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        embeddings = self.tower.embeddings
        convolve = embeddings.patch_embedding
        patches = convolve(pixel_values.to(convolve.weight.dtype)).flatten(2).transpose(1, 2)
        hidden = patches + embeddings.position_embedding(self.places)
        for layer in self.tower.encoder.layers:
            hidden = run_layer(layer, hidden, masked=True)
        rows = self.connector(self.tower.post_layernorm(hidden)).flatten(0, 1)
        assert isinstance(rows, torch.Tensor)
        return rows


def full_tile_places(side: int) -> torch.Tensor:
    """Index of the position embedding of each patch [side * side] of a tile without padding.

    The fractions of SmolVLMVisionEmbeddings in fp32: rounding gives some patches a neighbour's.
    """
    steps = torch.arange(side, dtype=torch.float32) * (
        1.0 / torch.tensor(side, dtype=torch.float32)
    )
    bounds = torch.arange(1 / side, 1.0, 1 / side, dtype=torch.float32)
    along = torch.bucketize(steps.clamp(max=1.0 - 1e-6), bounds, right=True)
    return (along[:, None] * side + along[None]).flatten()


FAMILY = SmolVLM()
