"""Finding a checkpoint (alias, folder or hub id) and reading its tensors one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from lvlm.core.discovery import discover, nearest
from lvlm.core.errors import CheckpointError, LvlmError, ParameterError
from lvlm.export.checkpoint.adapter import CONFIG as ADAPTER
from lvlm.export.checkpoint.adapter import base_of
from lvlm.export.checkpoint.checkpoint_form import Form, MadeTensor
from lvlm.export.checkpoint.form_discovery import find_forms
from lvlm.export.checkpoint.hub import fetch
from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor
from lvlm.export.checkpoint.weight_files import INDEX, Stored, weight_files
from lvlm.export.checkpoint.weight_readers import header, open_weights
from lvlm.export.families.family import Family
from lvlm.export.families.parts.side_files import read_json
from lvlm.runtime.bundle.manifest import MANIFEST

SHIPPED = {"tiny-llava": "tiny-llava"}  # alias -> folder in lvlm.assets
ROWS = 4096  # compared at once: a vocabulary's embeddings need not fit into memory twice
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face format. ``source`` is what the user may look it up by; ``absent``
    are weight files that are still to be downloaded, ``absent_bytes`` in all. ``forms`` make a
    plain checkpoint of what its files hold, one after the other."""

    folder: Path
    source: str
    revision: str | None
    absent: Mapping[str, Mapping[str, Stored]] = field(default_factory=dict)
    absent_bytes: int = 0
    forms: tuple[Form, ...] = ()
    adapter: Path | None = None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json, or what it would be of the plain checkpoint."""
        made = [form.config for form in self.forms if form.config is not None]
        return made[-1] if made else self.stored_config

    @cached_property
    def stored_config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json", required=True)

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files that transformers would read, in its order."""

        def exists(name: str) -> bool:
            return name in self.absent or os.path.isfile(self.folder / name)

        return [
            self.folder / name for name in weight_files(self.folder, self.stored_config, exists)
        ]

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor of the plain checkpoint."""
        found: dict[str, Stored] = dict(self.stored)
        for form in self.forms:
            found = {name: found[name] for name in found if name not in form.used}
            for name, made in form.made.items():
                found[name] = Stored(self.folder, made.shape, made.dtype)
        return found

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """Every tensor of the weight files, from their headers alone.

        An index only says which files there are, as in transformers: what they hold counts.
        """
        found: dict[str, Stored] = {}
        for path in self.weight_files:
            held = self.absent.get(path.relative_to(self.folder).as_posix()) or header(path)
            if twice := found.keys() & held.keys():
                name = min(twice)
                raise CheckpointError(
                    f"{name} is in {found[name].file.name} and in {path.name}; "
                    "remove the file that does not belong to the checkpoint"
                )
            found |= held
        if not found:
            raise CheckpointError(f"{self.folder} has weight files without a tensor")
        return found

    def stored_dtype(self) -> torch.dtype | None:
        """The weights' own: as the index says, or of the first tensor that is floating point."""
        index = self.folder / INDEX
        if index not in self.weight_files and len(self.weight_files) > 1:
            metadata = read_json(index).get("metadata")
            named = metadata.get("dtype") if isinstance(metadata, dict) else None
            if isinstance(named, str) and getattr(torch, named, None) in DTYPES.values():
                return getattr(torch, named)  # type: ignore[no-any-return]
        first = self.weight_files[0]
        of_first = (t for t in self.stored.values() if t.file == first)
        return next((DTYPES[t.dtype] for t in of_first if t.dtype in DTYPES), None)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, made where it is. A file is opened anew each time: a map kept open would keep
        every page that was read in memory."""
        return self._read(name, len(self.forms))

    def _read(self, name: str, level: int) -> torch.Tensor:
        """The tensor as the first ``level`` forms have it."""
        for below in reversed(range(level)):
            if (made := self.forms[below].made.get(name)) is not None:
                return made.make(lambda other, below=below: self._read(other, below))  # type: ignore[misc]
        return self.read_stored(name)

    def read_stored(self, name: str) -> torch.Tensor:
        """One tensor as its file has it."""
        with open_weights(self.stored[name].file) as file:
            tensor = file.get_tensor(name)
            assert isinstance(tensor, torch.Tensor)
            return tensor

    @cached_property
    def made(self) -> Mapping[str, MadeTensor]:
        """Tensors that no file holds as they are, by name."""
        found: dict[str, MadeTensor] = {}
        for form in self.forms:
            found |= form.made
        return found

    @cached_property
    def packed(self) -> Mapping[str, PackedTensor]:
        """Weights that a bundle can hold as the integers that they are."""
        if any(form.unkept for form in self.forms):
            return {}
        return {n: made for n, made in self.made.items() if isinstance(made, PackedTensor)}

    @property
    def words(self) -> str:
        """A description of the checkpoint, for a report."""
        names = {stored.file.name for stored in self.stored.values()}
        kinds = {Path(name).suffix for name in names}
        files = "safetensors" if kinds == {".safetensors"} else "torch's own"
        plain = f"{files}, {len(names)} file{'s' if len(names) > 1 else ''}"
        return "; ".join([*(form.words for form in self.forms), plain])

    def equal(self, one: str, other: str) -> bool:
        """True where two tensors hold the same values, read a part at a time; of what is not here,
        or made, it is said that they do not."""
        a, b = self.tensors[one], self.tensors[other]
        if a.shape != b.shape or self.absent or one in self.made or other in self.made:
            return False
        with open_weights(a.file) as first, open_weights(b.file) as second:
            left, right = first.get_slice(one), second.get_slice(other)
            return all(
                torch.equal(left[i : i + ROWS].double(), right[i : i + ROWS].double())
                for i in range(0, a.shape[0], ROWS)
            )


def find_family(config: Mapping[str, Any], source: str) -> Family:
    """The family of a config.json, or an error naming the architecture. One that takes a type with
    its vision tower's alone comes before one that takes the type."""
    families: dict[str, Family] = discover("lvlm.export.families", "FAMILY")
    kind, vision = config.get("model_type"), config.get("vision_config")
    tower = vision.get("model_type") if isinstance(vision, Mapping) else None
    for asked in (f"{kind}/{tower}", kind):
        for family in families.values():
            if asked in family.model_types:
                return family
    known = ", ".join(t for f in families.values() for t in f.model_types)
    raise CheckpointError(
        f"{source} is of the architecture '{str(kind)[:80]}', which is not supported; "
        f"supported: {known}"
    )


def resolve(
    model: str, revision: str | None = None, *, weights: bool = True, quiet: bool = False
) -> Checkpoint:
    """A checkpoint from an alias, a local folder or a hub id.

    What is on the hub is downloaded if need be, with its progress on standard error unless
    ``quiet``; without ``weights`` only the small files are.

    Raises CheckpointError, and ParameterError where ``revision`` has no meaning.
    """
    if _is_adapter(model):
        return _base(Path(model), revision, weights=weights, quiet=quiet)
    if model in SHIPPED or os.path.isdir(model):
        if revision is not None:
            what = "shipped with this package" if model in SHIPPED else "a folder"
            raise ParameterError(
                f"--revision {revision[:80]}: {model} is {what} and has no revisions; leave it out"
            )
        folder = Path(str(resources.files("lvlm.assets") / SHIPPED.get(model, "")))
        found = Checkpoint(folder if model in SHIPPED else Path(model), model, None)
    else:
        hub_id = _hub_id(model)
        got = fetch(hub_id, revision, weights=weights, quiet=quiet)
        found = Checkpoint(got.folder, hub_id, revision, got.absent, got.absent_bytes)
    _refuse_bundle(found)
    _refuse_adapter(found)
    with described_by(found):
        return replace(found, forms=find_forms(found))


def _hub_id(model: str) -> str:
    aliases = known_aliases()
    hub_id = aliases.get(model, model)
    if hub_id.count("/") != 1 or model.startswith((".", "/", "~")):
        if "/" in model or Path(model).suffix:
            raise CheckpointError(f"{model[:80]} is no folder; give an alias, a folder or a hub id")
        raise nearest("model", model[:80], [*aliases, *SHIPPED])
    return hub_id


def _refuse_bundle(checkpoint: Checkpoint) -> None:
    if os.path.exists(checkpoint.folder / MANIFEST):
        raise CheckpointError(
            f"{checkpoint.source} is a bundle, exported already; give the checkpoint that it was "
            "made from, or answer with it: lvlm-run"
        )


def _refuse_adapter(checkpoint: Checkpoint) -> None:
    """transformers would add it to the weights; without it the answers are other ones."""
    if os.path.exists(checkpoint.folder / ADAPTER):
        raise CheckpointError(
            f"{checkpoint.source} holds an adapter ({ADAPTER}) beside a model; move its files to a "
            "folder of their own and give that with --lora, or remove them to export the base model"
        )


def _is_adapter(model: str) -> bool:
    """A folder with an adapter and no model."""
    return os.path.isfile(Path(model) / ADAPTER) and not os.path.exists(Path(model) / "config.json")


def _base(adapter: Path, revision: str | None, *, weights: bool, quiet: bool) -> Checkpoint:
    """The model that an adapter was trained on, with the adapter."""
    if revision is not None:
        raise ParameterError(f"--revision {revision[:80]}: {adapter} is a folder; leave it out")
    named, of_base = base_of(adapter)
    if _is_adapter(named):
        raise CheckpointError(f"{adapter} is an adapter of another one, {named}; merge that first")
    try:
        found = resolve(
            named, None if os.path.isdir(named) else of_base, weights=weights, quiet=quiet
        )
    except LvlmError as error:
        raise CheckpointError(
            f"{adapter} is an adapter, and its base model is not found ({error}); give that with "
            f"-m and --lora {adapter}"
        ) from None
    return replace(found, adapter=adapter)


@contextmanager
def described_by(checkpoint: Checkpoint) -> Iterator[None]:
    """Context in which whatever transformers or torch raise for words and numbers of the
    checkpoint's files, which is of many types, is a CheckpointError of one line."""
    try:
        yield
    except (LvlmError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the files of {checkpoint.source} describe no model that can be exported: "
            f"{type(error).__name__}: {reason}"
        ) from error


def known_aliases() -> dict[str, str]:
    families: dict[str, Family] = discover("lvlm.export.families", "FAMILY")
    return {alias: hub_id for f in families.values() for alias, hub_id in f.aliases.items()}


def describe(config: Mapping[str, Any]) -> str:
    """The architecture in a word, for reports."""
    names = config.get("architectures") or [config.get("model_type")]
    return json.dumps(names[0]).strip('"')
