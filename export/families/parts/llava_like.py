"""Parts that LLaVA-like families share: CLIP or SigLIP tower, projector, Llama, Mistral or Qwen2
text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPVisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipVisionEmbeddings

from lvlm.core.errors import CheckpointError
from lvlm.export.families.family import too_few_tokens
from lvlm.export.families.parts.feature_layers import feature_layers
from lvlm.export.families.parts.leaf_tables import TEXTS, Kinds, leaves
from lvlm.export.families.parts.llama_text import language_model, read_common, token_text
from lvlm.export.families.parts.pixel_values import PixelValues
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.graphs.repeats import run_layer
from lvlm.export.leaves import Attention, Places
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.processors import load_processor
from lvlm.runtime.processors.parts.anyres import TiledProcessor, Tiles
from lvlm.runtime.prompt.prompts import Prompt

TOWERS: Kinds = {
    "clip_vision_model": {CLIPVisionEmbeddings: Places(), CLIPAttention: Attention(turn=None)},
    "siglip_vision_model": {
        SiglipVisionEmbeddings: Places(),
        SiglipAttention: Attention(turn=None),
    },
}
LEAVES = leaves(TEXTS, TOWERS)


def tile_tokens(config: Any) -> int:
    """Tokens that the vision tower gives for one image or tile."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    # "default" drops the first token; only CLIP has a class token there.
    extra = int(vision.model_type == "clip_vision_model")
    return int(side * side) + extra - rows_dropped(config)


def rows_dropped(config: Any) -> int:
    """Rows of a tower that are left out, before those of an image."""
    return int(config.vision_feature_select_strategy == "default")


class AnyResolution(PixelValues):
    """See Family; a subclass per transformers class. Tiles, each line of patches with a newline."""

    name: str
    model_types: tuple[str, ...]
    image_handling: str
    video: str
    leaves = LEAVES
    config_class: Any
    tower_type: str  # where config.json names none
    text_type: str

    def processor(self, config: Any, folder: Path) -> dict[str, Any]:
        """The config of the family's processor; ParameterError."""
        raise NotImplementedError

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        config = read_common(
            self.name, self.config_class, raw, TEXTS, self.text_type, TOWERS, self.tower_type
        )
        feature_layers(config)
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        if tile_tokens(config) != side * side:
            raise CheckpointError(
                f"vision_feature_select_strategy '{config.vision_feature_select_strategy}' of a "
                f"{vision.model_type} leaves {tile_tokens(config)} features of {side} x {side} "
                "patches, which are no grid; not supported"
            )
        return config

    def language(self, model: Any, config: Any) -> LanguageModel:
        return language_model(self, model.model.language_model, model.lm_head, config.text_config)

    def vision(self, model: Any, config: Any) -> nn.Module:
        return TilesVision(model, feature_layers(config), rows_dropped(config))

    def transformers_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        found = super().transformers_inputs(prompt)
        return found and found | {"image_sizes": torch.tensor([p.size for p in prompt.images])}

    def images(self, config: Any, folder: Path) -> Images:
        side = config.vision_config.image_size
        processor = self.processor(config, folder)
        if [list(x) for x in processor["resolutions"]] != [
            list(x) for x in config.image_grid_pinpoints
        ]:
            raise CheckpointError(
                "image_grid_pinpoints of config.json and of the image processor differ; "
                "the folder mixes files of two models"
            )
        tiles = _tiles(processor)
        return Images(
            token=token_text(folder, config.image_token_id),
            token_id=config.image_token_id,
            tokens=tiles.max_tokens,
            grid=(),
            size=(side, side),
            processor=processor,
            shared_rows=1,
            max_dims={"units": tiles.max_units},
        )

    def bounded(self, images: Images, tokens: int) -> Images:
        min_tokens = _tiles(images.processor).min_tokens
        if tokens < min_tokens:
            raise too_few_tokens(tokens, min_tokens)
        processor = images.processor | {"max_tokens": tokens}
        tiles = _tiles(processor)
        max_dims = {"units": tiles.max_units}
        return replace(images, tokens=tiles.max_tokens, processor=processor, max_dims=max_dims)


def _tiles(processor: Mapping[str, Any]) -> Tiles:
    return cast(TiledProcessor, load_processor(processor)).tiles


class LlavaVision(nn.Module):
    """Tower up to the feature layer(s), then the projector: [units,3,H,W] -> [rows,D]."""

    def __init__(self, model: Any, layers: Sequence[int], first: int = 0) -> None:
        """``layers``: 0 is what enters the first; ``first``: rows of an image before its own."""
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.wanted, self.first = layers, first

    @property
    def score_width(self) -> int:
        """Numbers per row that ``scored`` gives besides."""
        return 1 + int(self.tower.encoder.layers[0].self_attn.head_dim)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._rows(self._states(pixel_values))

    def scored(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, and [rows,1+d] of each: the attention that its patch gets in the last layer that is
        used, from the class token or else from all patches (their mean), summed over the heads; and
        its key there, the mean over the heads. Source: VisionZip (arXiv 2412.04467, section 3)."""
        states = self._states(pixel_values)
        layer, hidden = self.tower.encoder.layers[len(states) - 2], states[-2]
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        units, patches, _ = hidden.shape
        shape = (units, patches, attention.num_heads, attention.head_dim)
        key = attention.k_proj(normed).view(shape)
        asking = normed[:, :1] if hasattr(self.tower.embeddings, "class_embedding") else normed
        query = attention.q_proj(asking).view(units, -1, *shape[2:])
        logits = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * attention.head_dim**-0.5
        weights = logits.float().softmax(-1)  # [units,heads,queries,patches]
        heads, queries = shape[2], weights.shape[2]
        # Sums and means as products: TensorRT's parser does not take torch's axes for constants
        share = weights.new_full((1, heads * queries), 1 / queries)
        paid = share @ weights.reshape(units, heads * queries, patches)
        mean = key.float().transpose(2, 3) @ weights.new_full((heads, 1), 1 / heads)
        found = torch.cat([paid.transpose(1, 2), mean.flatten(2)], dim=-1)
        return self._rows(states), found[:, self.first :].flatten(0, 1)

    def _states(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        hidden = self.tower.embeddings(pixel_values)
        if hasattr(self.tower, "pre_layrnorm"):
            hidden = self.tower.pre_layrnorm(hidden)
        states = [hidden]
        for layer in self.tower.encoder.layers[: max(self.wanted)]:
            states.append(run_layer(layer, states[-1], masked=True))
        return states

    def _rows(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        features = torch.cat([states[i][:, self.first :] for i in self.wanted], dim=-1)
        rows = self.projector(features).flatten(0, 1)
        assert isinstance(rows, torch.Tensor)
        return rows


class TilesVision(LlavaVision):
    """The newline that ends a line of patches, then the rows of all tiles: [1 + rows,D]."""

    def __init__(self, model: Any, layers: Sequence[int], first: int = 0) -> None:
        super().__init__(model, layers, first)
        self.newline = model.model.image_newline

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.newline[None], super().forward(pixel_values)])

    def scored(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The newline gets no attention."""
        rows, scores = super().scored(pixel_values)
        return torch.cat([self.newline[None], rows]), torch.cat([0 * scores[:1], scores])


# Of tiny configurations


def tiny_preprocessor(kind: str, config: Any) -> dict[str, str]:
    """preprocessor_config.json of an image processor class."""
    side = config.vision_config.image_size
    size = {"height": side, "width": side}
    processor = {
        "image_processor_type": kind,
        "size": size,
        "crop_size": size,
        "image_grid_pinpoints": config.image_grid_pinpoints,
    }
    return {"preprocessor_config.json": json.dumps(processor)}
