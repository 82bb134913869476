"""Finding a checkpoint (alias, folder or hub id) and reading its tensors one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lvlm.export.families._base import Family
from lvlm.export.families._files import read_json
from lvlm.runtime.discovery import discover, nearest
from lvlm.runtime.errors import CheckpointError

SHIPPED = {"tiny-llava": "tiny-llava"}  # alias -> folder in lvlm.assets
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face format. ``source`` is what the user may look it up by."""

    folder: Path
    source: str
    revision: str | None

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json", required=True)

    @cached_property
    def files(self) -> dict[str, Path]:
        """Stored tensor name -> safetensors file."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict):
                raise CheckpointError(f"{index} has no weight_map")
            names = {str(k): self.folder / Path(str(v)).name for k, v in listed.items()}
            for path in sorted(set(names.values())):
                if not path.is_file():
                    raise CheckpointError(f"{path} is listed in {index.name} but missing")
            return names
        single = self.folder / "model.safetensors"
        if not single.is_file():
            raise CheckpointError(
                f"{self.folder} has no model.safetensors or model.safetensors.index.json; "
                "save the checkpoint in safetensors format"
            )
        with _open(single) as file:
            return {str(name): single for name in file.keys()}  # noqa: SIM118

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(stored name, shape) of every tensor, from the files' headers alone."""
        by_file: dict[Path, list[str]] = {}
        for name, path in self.files.items():
            by_file.setdefault(path, []).append(name)
        for path, names in by_file.items():
            with _open(path) as file:
                held = set(file.keys())
                for name in names:
                    if name not in held:
                        raise CheckpointError(f"{path} lacks '{name}', which its index lists")
                    yield name, tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """One tensor. The file is opened anew each time: a map kept open would keep every page
        that was read in memory."""
        with _open(self.files[name]) as file:
            tensor = file.get_tensor(name)
            assert isinstance(tensor, torch.Tensor)
            return tensor


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error}") from None


def find_family(config: Mapping[str, Any], source: str) -> Family:
    """The family of a config.json, or an error naming the architecture."""
    families: dict[str, Family] = discover("lvlm.export.families", "FAMILY")
    kind = config.get("model_type")
    for family in families.values():
        if kind in family.model_types:
            return family
    known = ", ".join(t for f in families.values() for t in f.model_types)
    raise CheckpointError(
        f"{source} is of the architecture '{kind}', which is not supported; supported: {known}"
    )


def resolve(model: str, revision: str | None = None) -> Checkpoint:
    """A checkpoint from an alias, a local folder or a hub id (downloaded if need be)."""
    if model in SHIPPED:
        folder = resources.files("lvlm.assets") / SHIPPED[model]
        return Checkpoint(Path(str(folder)), model, None)
    folder = Path(model)
    if folder.is_dir():
        return Checkpoint(folder, str(folder), None)
    aliases = known_aliases()
    hub_id = aliases.get(model, model)
    if hub_id.count("/") != 1 or model.startswith((".", "/", "~")):
        if "/" in model or folder.suffix:
            raise CheckpointError(f"{model} is no folder; give an alias, a folder or a hub id")
        raise nearest("model", model, [*aliases, *SHIPPED])
    return Checkpoint(_download(hub_id, revision), hub_id, revision)


def known_aliases() -> dict[str, str]:
    families: dict[str, Family] = discover("lvlm.export.families", "FAMILY")
    return {alias: hub_id for f in families.values() for alias, hub_id in f.aliases.items()}


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=HUB_FILES))
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached and the model is not in the local cache"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    raise CheckpointError(
        f"{hub_id} could not be downloaded: {reason}; give a local folder with -m"
    )


def match_weights(checkpoint: Checkpoint, family: Family, model: nn.Module) -> dict[str, str]:
    """Parameter name -> stored name, after comparing every name and shape.

    A missing, extra or misshapen weight is an error that names it. A tied parameter may be absent:
    it takes the stored tensor of the one it shares.
    """
    wanted = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    stored: dict[str, str] = {}
    for key, shape in checkpoint.shapes():
        name = family.rename(key)
        if name is None:
            continue
        if name not in wanted:
            raise CheckpointError(f"{checkpoint.source} has a weight the model lacks: {key}")
        if name in stored:
            raise CheckpointError(
                f"{checkpoint.source} has {stored[name]} and {key} for one weight"
            )
        if shape != wanted[name]:
            raise CheckpointError(
                f"{checkpoint.source}: {key} has shape {list(shape)}, "
                f"config.json asks for {list(wanted[name])}"
            )
        stored[name] = key
    shared: dict[int, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in stored:
        shared.setdefault(id(parameters[name]), name)
    missing = [n for n in wanted if n not in stored and id(parameters[n]) not in shared]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{checkpoint.source} lacks the weight {missing[0]}{more}")
    return {n: stored.get(n) or stored[shared[id(parameters[n])]] for n in wanted}


def total_bytes(checkpoint: Checkpoint) -> int:
    """Size on disk of the safetensors files."""
    return sum(p.stat().st_size for p in set(checkpoint.files.values()))


def describe(config: Mapping[str, Any]) -> str:
    """The architecture in a word, for reports."""
    names = config.get("architectures") or [config.get("model_type")]
    return json.dumps(names[0]).strip('"')
