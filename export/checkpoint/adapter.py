"""A LoRA adapter as PEFT saves it: its options, and its tensors by the layer that they change."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvlm.core.errors import CheckpointError
from lvlm.export.checkpoint.weight_files import Stored
from lvlm.export.checkpoint.weight_readers import header
from lvlm.export.families.parts.side_files import read_json

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
# Options that change no merged weight beyond what the tensors say
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type"),
    *("inference_mode", "peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern"),
    *("alpha_pattern", "use_rslora", "use_dora", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "bias", "runtime_config"),
    *("qalora_group_size", "ensure_weight_tying", "megatron_core", "eva_config"),
    # Of layers of another class than a model's linear ones; PEFT, too, takes it for false there
    "fan_in_fan_out",
}
# Ways to begin training that leave the base weights alone
BEGUN = (True, False, None, "gaussian", "eva", "orthogonal")
KINDS = r"lora_(?:(A|B)(?:\.default)?\.weight|embedding_(A|B)(?:\.default)?|(magnitude_vector).*)"


@dataclass
class Change:
    """An adapter's change of one layer: names of its tensors. ``saved``: a whole parameter."""

    down: str = ""  # A [r, K]
    up: str = ""  # B [N, r]
    magnitude: str = ""
    embedding: bool = False
    saved: str = ""


@dataclass(frozen=True)
class Adapter:
    """A folder with an adapter. ``changes``: by the parameter's name in the model trained."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    changes: Mapping[str, Change] = field(default_factory=dict)

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B @ A of a layer. CheckpointError if ``rank`` is another than the
        options say."""
        said = self._of_pattern("rank_pattern", module, self.config.get("r", 8))
        if said != rank:
            raise CheckpointError(
                f"{self.folder}: {module} has rank {rank}, {CONFIG} says {str(said)[:20]}"
            )
        alpha = self._of_pattern("alpha_pattern", module, self.config.get("lora_alpha", 8))
        if not isinstance(alpha, int | float):
            raise CheckpointError(f"{self.folder}/{CONFIG}: alpha is {str(alpha)[:40]}, no number")
        divisor: float = rank**0.5 if self.config.get("use_rslora") else rank
        return float(alpha / divisor)

    def _of_pattern(self, name: str, module: str, default: Any) -> Any:
        """The first whose pattern is the end of a layer's path."""
        patterns = self.config.get(name) or {}
        if not isinstance(patterns, Mapping):
            raise CheckpointError(f"{self.folder}/{CONFIG}: {name} is no object")
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise CheckpointError(
                    f"{self.folder}/{CONFIG}: {name} has {pattern[:60]!r}, no pattern: {error}"
                ) from None
        return default


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder. CheckpointError names what is not supported."""
    config = read_json(folder / CONFIG, required=True)
    _check(folder, config)
    file = next((folder / name for name in WEIGHTS if os.path.isfile(folder / name)), None)
    if file is None:
        raise CheckpointError(f"{folder} has no {WEIGHTS[0]}; is the adapter complete?")
    tensors = header(file)
    changes: dict[str, Change] = {}
    for key in tensors:
        _sort_in(folder, key, config, changes)
    if not changes:
        raise CheckpointError(f"{file} holds no tensor")
    for name, change in changes.items():
        if not change.saved and not (change.down and change.up):
            raise CheckpointError(f"{file} has one half of {name} only; is the adapter complete?")
    return Adapter(folder, config, tensors, changes)


def base_of(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the model that the adapter in ``folder`` was trained on, a path where
    one beside it is meant. Raises CheckpointError."""
    config = read_json(folder / CONFIG, required=True)
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(named, str) or not named:
        raise CheckpointError(
            f"{folder} is an adapter that does not name its base model; give that with -m and "
            f"--lora {folder}"
        )
    beside = folder / named
    path = str(beside) if not os.path.isdir(named) and os.path.isdir(beside) else named
    return path, revision if isinstance(revision, str) else None


def _check(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    merge = "merge it with peft (merge_and_unload, save_pretrained) and export that"
    if kind != "LORA":
        raise CheckpointError(f"{folder} is an adapter of type {str(kind)[:40]}, not LORA; {merge}")
    begun = config.get("init_lora_weights", True)
    if begun not in BEGUN:
        raise CheckpointError(
            f"{folder}/{CONFIG}: init_lora_weights '{str(begun)[:40]}' changes the base weights, "
            f"too; {merge}"
        )
    known = HARMLESS | {"init_lora_weights"}
    for name, value in config.items():
        if name not in known and value not in (None, False, [], {}, ""):
            raise CheckpointError(f"{folder}/{CONFIG}: {name[:60]} is not supported; {merge}")


def _sort_in(folder: Path, key: str, config: Mapping[str, Any], changes: dict[str, Change]) -> None:
    """Put a tensor where it belongs."""
    name = key.removeprefix(PREFIX)
    found = re.search(rf"\.{KINDS}$", name)
    if found is None:
        if "lora_" in name or "token_adapter" in name:
            raise CheckpointError(
                f"{folder}: {key[:200]} is not supported; merge the adapter with peft "
                "(merge_and_unload, save_pretrained) and export that"
            )
        plain = re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", name)
        changes.setdefault(plain, Change()).saved = key
        return
    change = changes.setdefault(f"{name[: found.start()]}.weight", Change())
    part, of_embedding, magnitude = found.groups()
    if magnitude:
        if not config.get("use_dora"):
            raise CheckpointError(f"{folder} has {key[:200]}, but {CONFIG} says no use_dora")
        change.magnitude = key
    elif (part or of_embedding) == "A":
        change.down, change.embedding = key, bool(of_embedding)
    else:
        change.up = key
