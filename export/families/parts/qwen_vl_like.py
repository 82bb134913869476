"""Parts that the Qwen-VL families share: images at their own resolution, three rotary positions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lvlm.core.errors import CheckpointError
from lvlm.export.families.family import PromptFiles
from lvlm.export.families.parts.leaf_tables import Kinds, rope_types
from lvlm.export.families.parts.llama_text import (
    added_token,
    build_model,
    language_model,
    one_of,
    preprocessor,
    read_common,
    section,
    tiny_tokenizer,
    token_text,
    video_preprocessor,
)
from lvlm.export.families.parts.mrope import MropeRotary, one_after_another
from lvlm.export.families.parts.qwen_vision import QwenVision
from lvlm.export.families.parts.side_files import prompt_files
from lvlm.export.graphs.language_model import LanguageModel, LayerState
from lvlm.export.leaves import FIXED_TABLES, Table
from lvlm.export.ports import GraphPort
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.processors.parts.frames import attempted
from lvlm.runtime.processors.parts.qwen_video import video_config
from lvlm.runtime.processors.qwen_vl import bounded_config, normalise_config
from lvlm.runtime.prompt.prompts import Prompt

VISION = ("<|vision_start|>", "<|vision_end|>")
# The first release calls the rotary embedding by the name of its three positions.
ROPES = (*FIXED_TABLES, "mrope")


class QwenVL:
    """See Family; a subclass per transformers class."""

    name: str
    model_types: tuple[str, ...]
    image_handling: str
    video: str
    text: ClassVar[Table]  # the leaf modules of the text model, and of the vision tower
    tower: ClassVar[Table]
    config_class: Any
    model_class: Any
    timed = False  # whether frames of a video have their time before them in words
    default_section: tuple[int, int, int] = (16, 24, 24)

    @property
    def leaves(self) -> Table:
        """See Family."""
        return {**self.text, **self.tower}

    def window(self, vision: Any) -> int | None:
        """Side in image tokens of the windows that most blocks attend in, None: no block does."""
        del vision
        return None

    def table(self, vision: Any) -> int | None:
        """Side of the square of learned positions, None: there are none."""
        del vision
        return None

    def states(self, text: Any) -> tuple[LayerState, ...]:
        """The states of layers that do not attend; (): all do."""
        del text
        return ()

    def second(self, vision: Any) -> int | None:
        """Rotary positions that a second of video lasts, None: each image of it lasts one."""
        del vision
        return None

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        own = self.model_types[0]
        flat = section(raw, "text_config") or raw
        rope = section(flat, "rope_parameters") or section(flat, "rope_scaling")
        rope_type = rope.get("rope_type") or rope.get("type") or "mrope"
        one_of(self.name, "rope_type", rope_type, rope_types(self.text))
        texts: Kinds = {own: self.text, f"{own}_text": self.text}
        config = read_common(self.name, self.config_class, raw, texts, own)
        text, vision = config.text_config, config.vision_config
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        half = int(size * text.rope_parameters.get("partial_rotary_factor", 1.0)) // 2
        shares = text.rope_parameters.get("mrope_section", self.default_section)
        if len(shares) != 3 or sum(shares) != half:
            raise CheckpointError(
                f"mrope_section {list(shares)} does not share out the {half} rotary angles of a "
                "head; this is no checkpoint with three positions per token"
            )
        for name in ("patch_size", "temporal_patch_size"):
            if not isinstance(getattr(vision, name), int):
                raise CheckpointError(f"vision {name} {getattr(vision, name)} is not supported")
        one_of(self.name, "in_channels", vision.in_channels, (3,))
        rope_type = vision.rope_parameters["rope_type"]
        one_of(self.name, "vision rope_type", rope_type, rope_types(self.tower))
        return config

    def build(self, config: Any) -> nn.Module:
        return build_model(self.model_class, config)

    def language(self, model: Any, config: Any) -> LanguageModel:
        parts, text = model.model.language_model, config.text_config
        found = language_model(self, parts, model.lm_head, text, self.states(text))
        shares = text.rope_parameters.get("mrope_section", self.default_section)
        (rotary,) = found.rotaries
        found = found.with_rotary(MropeRotary(rotary, self.axis(rotary, shares)))
        return replace(found, position_rows=3)

    def axis(self, rotary: Any, shares: Sequence[int]) -> torch.Tensor:
        """The one of a token's three positions that turns each angle of ``rotary``, [d / 2]
        int64."""
        del rotary
        return one_after_another(shares)

    def vision(self, model: Any, config: Any) -> nn.Module:
        vision = config.vision_config
        windowed = self.window(vision) is not None
        return QwenVision(model, vision.fullatt_block_indexes if windowed else None)

    def vision_inputs(self, images: Images) -> list[GraphPort]:
        config = images.processor
        count = config["merge"] ** 2
        values = 3 * config["frames"] * config["patch"] ** 2
        inputs = [
            GraphPort("pixel_values", torch.float32, ("units", count, values)),
            GraphPort("position_ids", torch.int64, ("units", count, 2)),
        ]
        if config["window"] is not None:
            inputs += [
                GraphPort("window", torch.int64, ("windows", config["window"] ** 2)),
                GraphPort("place", torch.int64, ("units",)),
            ]
        if config["table"] is not None:
            inputs += [
                GraphPort("learned", torch.int64, ("units", count, 4)),
                GraphPort("share", torch.float32, ("units", count, 4)),
            ]
        return inputs

    def transformers_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        if not prompt.images:
            return {}
        pixels = [p.arrays["pixel_values"] for p in prompt.images]
        grids = [[1, *(p.arrays["position_ids"].max((0, 1)) + 1)] for p in prompt.images]
        return {
            "pixel_values": torch.cat([torch.from_numpy(x).flatten(0, 1) for x in pixels]),
            "image_grid_thw": torch.tensor(grids),
            "mm_token_type_ids": torch.from_numpy(prompt.image_id > 0).int()[None],
        }

    def images(self, config: Any, folder: Path) -> Images:
        vision = config.vision_config
        video = attempted(lambda: self.video_config(config, folder))
        processor = normalise_config(
            preprocessor(folder), self.window(vision), self.table(vision), video
        )
        cut = {name: processor[name] for name in ("patch", "frames", "merge")}
        wanted = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        if tuple(cut.values()) != wanted:
            raise CheckpointError(
                f"the image processor cuts images into {cut}, config.json asks for {wanted}; "
                "the folder mixes files of two models"
            )
        return Images(
            token=token_text(folder, config.image_token_id),
            token_id=config.image_token_id,
            tokens=_max_dims(processor)["units"],
            grid=(),
            size=(),
            processor=processor,
            independent_units=False,
            positions="grid",
            deepstack_layers=len(getattr(vision, "deepstack_visual_indexes", ())),
            max_dims=_max_dims(processor),
        )

    def video_config(self, config: Any, folder: Path) -> dict[str, object]:
        """The processor config of videos; CheckpointError, ParameterError."""
        vision, timed = config.vision_config, self.timed
        cut = {
            "patch": vision.patch_size,
            "frames": vision.temporal_patch_size,
            "merge": vision.spatial_merge_size,
        }
        tokens = {
            "token": token_text(folder, config.video_token_id),
            "token_id": config.video_token_id,
            "image_token": token_text(folder, config.image_token_id),
            "before": added_token(folder, "vision_start_token", VISION[0]) if timed else "",
            "after": added_token(folder, "vision_end_token", VISION[1]) if timed else "",
        }
        return video_config(video_preprocessor(folder), tokens, cut, self.second(vision))

    def bounded(self, images: Images, tokens: int) -> Images:
        processor = bounded_config(images.processor, tokens)
        return replace(images, tokens=tokens, processor=processor, max_dims=_max_dims(processor))

    def prompt(self, config: Any, folder: Path) -> PromptFiles:
        return prompt_files(folder, config.text_config)


def _max_dims(processor: Mapping[str, Any]) -> dict[str, int]:
    tokens, window = processor["max_tokens"], processor["window"]
    found = {"units": tokens}
    # A strip one token high has the fewest tokens in each window
    return found if window is None else found | {"windows": -(-tokens // window)}


# Of tiny configurations


def tiny_text(layers: int, heads: int, kv_heads: int, section: list[int]) -> dict[str, Any]:
    return {
        "vocab_size": 640,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": section,
        },
    }


def tiny_preprocessor(vision: Any) -> dict[str, str]:
    """A preprocessor config for images of up to 30 tokens, unless they are long and thin."""
    token = (vision.patch_size * vision.spatial_merge_size) ** 2
    config = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 4 * token,
        "max_pixels": 30 * token,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    return {
        "preprocessor_config.json": json.dumps(config),
        "tokenizer.json": tiny_tokenizer("<|video_pad|>", *VISION),
    }
