"""A model family: one file that says how its checkpoints become the common parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lvlm.core.errors import ParameterError
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.leaves import Table
from lvlm.export.ports import GraphPort
from lvlm.runtime.bundle.manifest import Images
from lvlm.runtime.prompt.prompts import Prompt


@dataclass(frozen=True)
class PromptFiles:
    """The files and settings by which the runtime writes prompts and chooses answers.

    ``tokenizer`` is the content of the bundle's tokenizer.json, ``generation`` that of the
    manifest's field.
    """

    tokenizer: str
    chat_template: str | None
    special_tokens: dict[str, str]
    eos_ids: tuple[int, ...]
    generation: dict[str, Any]
    files: tuple[str, ...]  # of the checkpoint, copied into the bundle as they are


class Family(Protocol):
    """A family of checkpoints; the exporter knows no model but through this."""

    name: str
    aliases: Mapping[str, str]  # alias -> hub id
    # Of config.json: "llava"; with its vision_config's behind a slash, those alone: "llava/pixtral"
    model_types: tuple[str, ...]
    image_handling: str  # how an image becomes tokens, in a few words (--list-models)
    video: str  # how a video does, "" where there is none
    # Classes of transformers that compute by themselves, or attend, and what tracing makes of each
    leaves: Table

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        """The transformers configuration; CheckpointError names what is unsupported."""

    def build(self, config: Any) -> nn.Module:
        """The whole model in transformers' own class and torch's default dtype (called on the meta
        device to trace)."""

    def language(self, model: Any, config: Any) -> LanguageModel: ...

    def vision(self, model: Any, config: Any) -> nn.Module:
        """The arrays of a PreparedImage (vision_inputs) -> its rows [shared + rows,D] in the
        model's dtype."""

    def vision_inputs(self, images: Images) -> list[GraphPort]:
        """The arrays of a PreparedImage, in the order of the vision module's arguments; the first
        dimension is ``units``."""

    def transformers_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """Inputs of transformers' own ``generate`` for a prompt's images, besides token ids."""

    def images(self, config: Any, folder: Path) -> Images: ...

    def bounded(self, images: Images, tokens: int) -> Images:
        """The same with images scaled down to at most ``tokens`` each; ParameterError where that
        cannot be (``fixed_tokens``)."""

    def prompt(self, config: Any, folder: Path) -> PromptFiles: ...

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """Named small random configurations that cover what the family supports, for tests."""

    def tiny_files(self, config: Any) -> dict[str, str]:
        """Files beside the weights of such a configuration, for tests: name -> content. The
        tokenizer and the chat template are tiny-llava's unless they are among them."""


def fixed_tokens(images: Images, tokens: int) -> ParameterError:
    """The error of a family whose images all give the same number of tokens."""
    return ParameterError(
        f"--max-image-tokens {tokens}: every image gives {images.tokens} tokens with this model"
    )


def too_few_tokens(tokens: int, minimum: int) -> ParameterError:
    """The error of a family whose smallest images give ``minimum`` tokens."""
    return ParameterError(
        f"--max-image-tokens {tokens}: an image gives at least {minimum} tokens with this model"
    )
