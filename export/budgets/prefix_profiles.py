"""The PrefixKV profile file: what each layer keeps, for which checkpoint, measured on what."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lvlm.core.errors import BundleError, CheckpointError, ExportError, ParameterError
from lvlm.core.output import whole_file
from lvlm.core.typed_json import decode
from lvlm.export.checkpoint.checkpoint import Checkpoint, describe
from lvlm.runtime.policies.shares import ProfileRow

SCHEMA = 1
MAKE_ONE = "make one with lvlm-calibrate"
STRIDE = 4 << 20
LEADING_BYTES = 4096


@dataclass(frozen=True)
class LayerSpread:
    """Spread of the samples at the profile's keep.

    std  per layer, over the samples; fractions  per sample and layer, as ``search`` found them
    """

    std: tuple[float, ...]
    fractions: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ModelId:
    """The checkpoint a profile was made for; ``sha256`` as ``model_hash`` gives it."""

    source: str
    architecture: str
    sha256: str


@dataclass(frozen=True)
class DataId:
    """The samples, in number and by a hash of what the model was given."""

    sha256: str
    samples: int


@dataclass(frozen=True)
class RecipeId:
    """The recipe that shortened the sequence while importances were recorded."""

    name: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class PrefixProfile:
    """A profile file. ``rows`` by rising keep, ``keep`` among them."""

    kind: Literal["prefixkv"]
    schema: int
    keep: float
    rows: tuple[ProfileRow, ...]
    spread: LayerSpread
    layers: int
    model: ModelId
    data: DataId
    recipe: RecipeId
    tools: dict[str, str]

    def row(self) -> ProfileRow:
        """The row of ``keep``."""
        return next(row for row in self.rows if row.keep == self.keep)

    def write(self, path: Path) -> None:
        """Replaces ``path`` in one step. Raises ExportError."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        with whole_file(path, ExportError) as partial:
            partial.write_text(text + "\n", encoding="utf-8")


def read_profile(path: str | Path) -> PrefixProfile:
    """The checked profile in a file. Raises ParameterError, which names the file."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParameterError(f"the profile {path} does not exist; {MAKE_ONE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _no_profile(path, str(error)) from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema != SCHEMA:
        raise ParameterError(
            f"{path} has schema {schema}, this version reads {SCHEMA}; {MAKE_ONE} of this version"
        )
    try:
        profile = decode(PrefixProfile, data, path.name)
    except BundleError as error:
        raise _no_profile(path, str(error).removesuffix("; export the bundle again")) from None
    _check_values(profile, path)
    return profile


def _no_profile(path: Path, reason: str) -> ParameterError:
    reason = " ".join(reason.split())
    return ParameterError(f"{path} is not a PrefixKV profile ({reason[:200]}); {MAKE_ONE}")


def _check_values(profile: PrefixProfile, path: Path) -> None:
    """Check what types alone cannot say."""
    keeps = [row.keep for row in profile.rows]
    if keeps != sorted(set(keeps)) or profile.keep not in keeps:
        raise _no_profile(path, f"rows for the keeps {keeps}, made for {profile.keep}")
    per_layer = [row.fractions for row in profile.rows] + list(profile.spread.fractions)
    if any(len(x) != profile.layers for x in (*per_layer, profile.spread.std)):
        raise _no_profile(path, f"rows of other lengths than its {profile.layers} layers")
    if not all(0 < x <= 1 for row in per_layer for x in row) or not all(
        0 <= x < math.inf for x in profile.spread.std
    ):
        raise _no_profile(path, "fractions out of range")
    for row in profile.rows:
        if abs(math.fsum(row.fractions) / profile.layers - row.keep) > 1e-9:
            raise _no_profile(path, f"the fractions at keep {row.keep} have another mean")
    if profile.data.samples != len(profile.spread.fractions):
        raise _no_profile(path, f"fractions of other samples than its {profile.data.samples}")


def check_profile(profile: PrefixProfile, layers: int, model_sha256: str) -> None:
    """ParameterError if the profile was made for another model."""
    again = "calibrate for this model with lvlm-calibrate"
    if profile.layers != layers:
        raise ParameterError(
            f"the profile is for {profile.layers} layers, this model has {layers}; {again}"
        )
    if profile.model.sha256 != model_sha256:
        raise ParameterError(
            f"the profile was made for another checkpoint ({profile.model.source}, "
            f"{profile.model.architecture}); {again}"
        )


def identify(checkpoint: Checkpoint) -> ModelId:
    """The checkpoint as a profile records it; of a local folder, its name alone."""
    local = Path(checkpoint.source).is_dir()
    source = Path(checkpoint.source).absolute().name if local else checkpoint.source
    return ModelId(source, describe(checkpoint.config), model_hash(checkpoint))


def model_hash(checkpoint: Checkpoint) -> str:
    """A cheap identity of a checkpoint's configuration and weights.

    SHA-256 over config.json and, per safetensors file by name, its size, its header (names, types,
    shapes) and the first 4 KiB of every tensor: a fine-tuned model has the same header as its
    origin, but no tensor that was trained begins with the same numbers. Of other files, the
    beginning of every 4 MiB. Raises CheckpointError.
    """
    digest = hashlib.sha256()
    weights = {t.file for t in checkpoint.stored.values()}
    parts = [path for form in checkpoint.forms for path in form.parts]
    for path in (checkpoint.folder / "config.json", *sorted(weights), *parts):
        try:
            if path.suffix == ".json":
                digest.update(path.read_bytes())
            elif path.suffix != ".safetensors":
                _add_pieces(digest, path)
            else:
                _add_weights(digest, path)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    return digest.hexdigest()


def _add_weights(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if length > size:
            raise ValueError("not a safetensors file")
        header = file.read(length)
        digest.update(size.to_bytes(8, "little") + first + header)
        tensors = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        for begin, end in sorted(t["data_offsets"] for t in tensors.values()):
            file.seek(8 + length + begin)
            digest.update(file.read(min(end - begin, LEADING_BYTES)))


def _add_pieces(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for begin in range(0, size, STRIDE):
            file.seek(begin)
            digest.update(file.read(LEADING_BYTES))
