"""Parts that Pixtral and Mistral 3 share: a vision tower for images of any size, whose tokens stand
in the prompt in rows, Mistral text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.pixtral.modeling_pixtral import (
    PixtralAttention,
    PixtralRMSNorm,
    PixtralVisionRotaryEmbedding,
)

from lvlm.core.errors import CheckpointError
from lvlm.export.families.family import PromptFiles
from lvlm.export.families.parts.feature_layers import feature_layers
from lvlm.export.families.parts.leaf_tables import TEXTS, Kinds, rope_types
from lvlm.export.families.parts.llama_text import (
    build_model,
    language_model,
    one_of,
    preprocessor,
    read_common,
    tiny_tokenizer,
    token_text,
)
from lvlm.export.families.parts.side_files import prompt_files, read_json
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.repeats import like, repeated
from lvlm.export.leaves import RMS_NORM, Attention, Rotary, Table
from lvlm.export.ports import GraphPort
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.media.prepared_image import PreparedImage
from lvlm.runtime.processors.pixtral import max_tokens, normalise_config, with_max_tokens
from lvlm.runtime.prompt.prompts import Prompt

OWN_TEXTS: Kinds = {"mistral": TEXTS["mistral"]}
OWN_TOWERS: Kinds = {
    "pixtral": {
        PixtralRMSNorm: RMS_NORM,
        PixtralVisionRotaryEmbedding: Rotary(("axial",)),
        PixtralAttention: Attention(),
    }
}
PROCESSOR = "PixtralProcessor"  # of transformers, which writes images into prompts
IMAGE, ROW_END, IMAGE_END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"


class PixtralLike:
    """See Family; a subclass per transformers class. A row of image tokens is followed by a token
    of text: it has an embedding of the vocabulary, so that merging and dropping leave it alone."""

    name: str
    model_types: tuple[str, ...]
    image_handling = "its own size, a token of text after each row"
    video = ""
    leaves: ClassVar[Table]
    config_class: Any
    model_class: Any
    text_type: str  # where config.json names none
    tower_type: str
    processor_class: str  # where no file names one

    def merge(self, config: Any) -> int:
        """Patches along each side of an image token."""
        raise NotImplementedError

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        config = read_common(
            self.name,
            self.config_class,
            raw,
            OWN_TEXTS,
            self.text_type,
            OWN_TOWERS,
            self.tower_type,
        )
        vision = config.vision_config
        if not isinstance(vision.patch_size, int):
            raise CheckpointError(f"vision patch_size {vision.patch_size} is not supported")
        one_of(self.name, "num_channels", vision.num_channels, (3,))
        rope_type = vision.rope_parameters["rope_type"]
        one_of(self.name, "vision rope_type", rope_type, rope_types(OWN_TOWERS["pixtral"]))
        feature_layers(config)
        return config

    def build(self, config: Any) -> nn.Module:
        return build_model(self.model_class, config)

    def language(self, model: Any, config: Any) -> LanguageModel:
        return language_model(self, model.model.language_model, model.lm_head, config.text_config)

    def vision_inputs(self, images: Images) -> list[GraphPort]:
        patches, values = images.processor["merge"] ** 2, 3 * images.processor["patch"] ** 2
        return [
            GraphPort("pixel_values", torch.float32, ("units", patches, values)),
            GraphPort("position_ids", torch.int64, ("units", patches, 2)),
        ]

    def transformers_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        if not prompt.images:
            return {}
        images = [_image(prepared) for prepared in prompt.images]
        height, width = (max(image.shape[i] for image in images) for i in (1, 2))
        padded = torch.zeros(len(images), 3, height, width)
        for place, image in zip(padded, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        sizes = torch.tensor([image.shape[1:] for image in images])
        return {"pixel_values": padded, "image_sizes": sizes}

    def images(self, config: Any, folder: Path) -> Images:
        file = folder / "processor_config.json"
        given = read_json(file)
        one_of(self.name, "processor", _processor_class(folder, self.processor_class), (PROCESSOR,))
        cut = (given.get("patch_size", 16), given.get("spatial_merge_size", 1))
        patch, merge = config.vision_config.patch_size, self.merge(config)
        if cut != (patch, merge) and not file.is_file():
            raise CheckpointError(
                f"{folder} has no {file.name}, which says how images are cut: {PROCESSOR} takes "
                f"patch_size and spatial_merge_size {cut} without, config.json asks for "
                f"{(patch, merge)}; is the checkpoint complete?"
            )
        if cut != (patch, merge):
            raise CheckpointError(
                f"the processor has patch_size and spatial_merge_size {cut}, config.json asks for "
                f"{(patch, merge)}; the folder mixes files of two models"
            )
        token = token_text(folder, config.image_token_id)
        one_of(self.name, "image_token of the processor", given.get("image_token", IMAGE), (token,))
        processor = normalise_config(
            preprocessor(folder),
            patch,
            merge,
            token,
            given.get("image_break_token", ROW_END),
            given.get("image_end_token", IMAGE_END),
        )
        tokens = max_tokens(processor)
        return Images(
            token=token,
            token_id=config.image_token_id,
            tokens=tokens,
            grid=(),
            size=(),
            processor=processor,
            independent_units=False,
            max_dims={"units": tokens},
            patches=tokens * merge**2,
            patch_heads=config.vision_config.num_attention_heads,
        )

    def bounded(self, images: Images, tokens: int) -> Images:
        processor = with_max_tokens(images.processor, tokens)
        tokens = max_tokens(processor)
        return replace(
            images,
            tokens=tokens,
            processor=processor,
            max_dims={"units": tokens},
            patches=tokens * (images.patches // images.tokens),
        )

    def prompt(self, config: Any, folder: Path) -> PromptFiles:
        return prompt_files(folder, config.text_config)

    def tiny_files(self, config: Any) -> dict[str, str]:
        """Preprocessor files for images of up to 36 tokens."""
        patch, merge = config.vision_config.patch_size, self.merge(config)
        images = {
            "image_processor_type": "PixtralImageProcessor",
            "size": {"longest_edge": 6 * patch * merge},
        }
        processor = {
            "processor_class": PROCESSOR,
            "patch_size": patch,
            "spatial_merge_size": merge,
            "image_token": "<image>",  # of tiny-llava's tokenizer
        }
        return {
            "preprocessor_config.json": json.dumps(images),
            "processor_config.json": json.dumps(processor),
            "tokenizer.json": tiny_tokenizer(ROW_END, IMAGE_END),
        }


def _processor_class(folder: Path, default: str) -> str:
    """The processor class of transformers' AutoProcessor."""
    names = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    found = (read_json(folder / name).get("processor_class") for name in names)
    return str(next((name for name in found if name), default))


def _image(prepared: PreparedImage) -> torch.Tensor:
    """The image [3,H,W] of whose patches the arrays are made."""
    pixels = torch.from_numpy(prepared.arrays["pixel_values"]).flatten(0, 1)
    row, column = torch.from_numpy(prepared.arrays["position_ids"]).flatten(0, 1).unbind(1)
    patch = isqrt(pixels.shape[1] // 3)
    image = pixels.new_empty(int(row.max()) + 1, int(column.max()) + 1, 3, patch, patch)
    image[row, column] = pixels.reshape(-1, 3, patch, patch)
    return image.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


class PixtralVision(nn.Module):
    """Patches of one image to image tokens: the tower up to the feature layer(s), the projector.

    pixel_values [V,p,3*patch*patch] fp32, position_ids [V,p,2] int64: V tokens of p patches
    -> [V,D]

    All patches attend to one another, as within an image in transformers, where the mask keeps
    several of them apart.
    """

    def __init__(self, model: Any, config: Any) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.wanted = feature_layers(config)

    def forward(self, pixel_values: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        tower, shape = self.tower, position_ids.shape[:2]
        # The convolution's stride is its kernel: a product
        weight = tower.patch_conv.weight.flatten(1)
        patches = nn.functional.linear(pixel_values.flatten(0, 1).to(weight.dtype), weight)
        states = [tower.ln_pre(patches)[None]]
        cos, sin = tower.patch_positional_embedding(states[0], position_ids.flatten(0, 1))
        for layer in tower.transformer.layers[: max(self.wanted)]:
            given = {"hidden": states[-1], "cos": cos[None], "sin": sin[None]}
            states.append(repeated(_layer, layer, given, {"hidden": like(states[-1])})["hidden"])
        features = torch.cat([states[i] for i in self.wanted], dim=-1)
        return self.project(features.reshape(*shape, features.shape[-1]))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Features [V,p,d] of the patches -> image tokens [V,D]."""
        raise NotImplementedError


def _layer(
    layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> dict[str, torch.Tensor]:
    return {"hidden": layer(hidden, None, position_embeddings=(cos, sin))}
