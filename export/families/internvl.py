"""InternVL 2.5 to 3.5, the ``-hf`` checkpoints: InternViT, pixel shuffle, Qwen or Llama text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.internvl.modeling_internvl import (
    InternVLVisionAttention,
    InternVLVisionRMSNorm,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from lvlm.core.errors import CheckpointError
from lvlm.export.families.parts.leaf_tables import (
    TEXTS,
    Kinds,
    layer_window,
    leaves,
    text_leaves,
    with_rope_types,
)
from lvlm.export.families.parts.llama_text import (
    added_token,
    heads,
    language_model,
    one_of,
    preprocessor,
    read_common,
    tiny,
    tiny_tokenizer,
    token_text,
)
from lvlm.export.families.parts.pixel_values import PixelValues
from lvlm.export.families.parts.whole_tiles import fewer_tiles, tile_images
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.repeats import run_layer
from lvlm.export.leaves import RMS_NORM, Attention
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.processors.internvl import max_tokens, normalise_config, with_max_tokens

OWN_TEXTS: Kinds = {
    kind: with_rope_types(table, "dynamic")
    for kind, table in {
        "qwen2": TEXTS["qwen2"],
        "qwen3": text_leaves(
            Qwen3RMSNorm, Qwen3RotaryEmbedding, Qwen3Attention, window=layer_window
        ),
        "llama": TEXTS["llama"],
    }.items()
}
OWN_TOWERS: Kinds = {
    "internvl_vision": {
        InternVLVisionRMSNorm: RMS_NORM,
        InternVLVisionAttention: Attention(turn=None),
    }
}


class InternVL(PixelValues):
    """See Family. Tiles and a thumbnail; four patches, or what the config says, make one token."""

    name = "internvl"
    aliases: ClassVar[Mapping[str, str]] = {
        "internvl": "OpenGVLab/InternVL3-1B-hf",
        "internvl-2b": "OpenGVLab/InternVL3-2B-hf",
        "internvl-8b": "OpenGVLab/InternVL3-8B-hf",
    }
    model_types = ("internvl",)
    image_handling = "tiles, and the whole as one more"
    video = ""
    leaves = leaves(OWN_TEXTS, OWN_TOWERS)
    model_class = InternVLForConditionalGeneration

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        config = read_common(
            self.name, InternVLConfig, raw, OWN_TEXTS, "qwen2", OWN_TOWERS, "internvl_vision"
        )
        one_of(self.name, "vision_feature_layer", config.vision_feature_layer, (-1,))
        chosen = config.vision_feature_select_strategy
        one_of(self.name, "vision_feature_select_strategy", chosen, ("default",))
        (height, width), patch = config.vision_config.image_size, config.vision_config.patch_size
        shuffled = 1 / config.downsample_ratio
        if height != width or patch[0] != patch[1] or (height // patch[0]) % shuffled:
            raise CheckpointError(
                f"tiles of {height} x {width} pixels in patches of {patch[0]} x {patch[1]}, "
                f"{shuffled:g} along each side to a token, are not supported; squares that fit are"
            )
        return config

    def language(self, model: Any, config: InternVLConfig) -> LanguageModel:
        text, parts = config.text_config, model.model.language_model
        language = language_model(self, parts, model.lm_head, text)
        if text.rope_parameters["rope_type"] != "dynamic":
            return language
        # The angles are the usual ones up to this length, and grow with the length beyond
        parts.rotary_emb.rope_type = "default"
        return replace(language, longest=text.max_position_embeddings)

    def vision(self, model: Any, config: InternVLConfig) -> nn.Module:
        return InternVLVision(model, config)

    def images(self, config: InternVLConfig, folder: Path) -> Images:
        vision = config.vision_config
        along = int(vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio)
        token = token_text(folder, config.image_token_id)
        processor = normalise_config(
            preprocessor(folder),
            along * along,
            token,
            added_token(folder, "start_image_token", "<img>"),
            added_token(folder, "end_image_token", "</img>"),
        )
        size = tuple(vision.image_size)
        if processor["size"] != {"height": size[0], "width": size[1]}:
            raise CheckpointError(
                f"the image processor makes tiles of {processor['size']}, the vision tower takes "
                f"{size[0]} x {size[1]}; make them equal"
            )
        return tile_images(token, config.image_token_id, size, processor, max_tokens)

    def bounded(self, images: Images, tokens: int) -> Images:
        return fewer_tiles(images, tokens, with_max_tokens, max_tokens)

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """Two kinds of text, GQA and MHA, both norms, tiles and shuffles of two sizes."""
        size: dict[str, Any] = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 112}
        vision: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80}
        yield (
            "qwen2-gqa",
            tiny(
                InternVLConfig,
                Qwen2Config(
                    **size,
                    num_hidden_layers=4,
                    **heads(4, 2, 16),
                    rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e5},
                ),
                InternVLVisionConfig(
                    **vision,
                    num_hidden_layers=3,
                    num_attention_heads=3,
                    attention_bias=True,
                    image_size=[28, 28],
                    patch_size=[7, 7],
                ),
                image_token_id=3,
            ),
        )
        yield (
            "qwen3-mha-rms",
            tiny(
                InternVLConfig,
                Qwen3Config(**size, num_hidden_layers=2, **heads(2, 2, 32)),
                InternVLVisionConfig(
                    **vision,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    norm_type="rms_norm",
                    use_qk_norm=True,
                    use_mean_pooling=False,
                    image_size=[32, 32],
                    patch_size=[4, 4],
                ),
                image_token_id=3,
                downsample_ratio=0.25,
            ),
        )

    def tiny_files(self, config: InternVLConfig) -> dict[str, str]:
        height, width = config.vision_config.image_size
        processor = {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "crop_to_patches": False,
            "size": {"height": height, "width": width},
            "min_patches": 1,
            "max_patches": max(1, 200 // height),
        }
        return {
            "preprocessor_config.json": json.dumps(processor),
            "tokenizer.json": tiny_tokenizer("<img>", "</img>"),
        }


class InternVLVision(nn.Module):
    """Tower, pixel shuffle, projector: tiles [units,3,H,W] -> rows [units * tile tokens,D]."""

    def __init__(self, model: Any, config: InternVLConfig) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.shuffle, self.ratio = model.model.pixel_shuffle, config.downsample_ratio
        self.side = config.vision_config.image_size[0] // config.vision_config.patch_size[0]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.tower.embeddings(pixel_values)
        for layer in self.tower.encoder.layer:
            hidden = run_layer(layer, hidden, masked=False)
        patches = self.tower.layernorm(hidden)[:, 1:]  # without the class token
        grid = patches.reshape(patches.shape[0], self.side, self.side, patches.shape[-1])
        rows = self.projector(self.shuffle(grid, self.ratio).flatten(1, 2)).flatten(0, 1)
        assert isinstance(rows, torch.Tensor)
        return rows


FAMILY = InternVL()
