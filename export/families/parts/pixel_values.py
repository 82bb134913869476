"""Common parts of families whose vision tower takes tiles, or whole images, of pixels only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lvlm.export.families.family import PromptFiles
from lvlm.export.families.parts.llama_text import build_model
from lvlm.export.families.parts.side_files import prompt_files
from lvlm.export.ports import GraphPort
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.prompt.prompts import Prompt


class PixelValues:
    """See Family. ``pixel_values`` [units,3,H,W] are all that is taken of an image."""

    model_class: Any  # of transformers

    def build(self, config: Any) -> nn.Module:
        return build_model(self.model_class, config)

    def vision_inputs(self, images: Images) -> list[GraphPort]:
        return [GraphPort("pixel_values", torch.float32, ("units", 3, *images.size))]

    def transformers_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        pixels = [torch.from_numpy(p.arrays["pixel_values"]) for p in prompt.images]
        return {"pixel_values": torch.cat(pixels)} if pixels else {}

    def prompt(self, config: Any, folder: Path) -> PromptFiles:
        return prompt_files(folder, config.text_config)
