"""The bundle: a folder with graphs, weights, tokenizer and the manifest ``lvlm.json``, their list.

The exporter writes these types, the runtime reads them. Nothing in a bundle is trusted: every field
has its type checked, every file is listed and has its recorded hash.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from lvlm.runtime.errors import BundleError
from lvlm.runtime.integrity import File, check_files

SCHEMA = 4
READABLE = (3, SCHEMA)  # 3 has neither ``generation`` nor hashes of blocks
MANIFEST = "lvlm.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Port:
    """One input or output of a graph; a dimension that is a name is dynamic."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """``weights`` are the names of its large initializers; ``lowered``: target -> file of the same
    graph, inputs, outputs and weights too, as that target runs it best."""

    file: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: tuple[str, ...] = ()
    lowered: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Weight:
    """Where a tensor lies: ``bytes`` of ``file`` from ``offset`` on, row-major."""

    file: str
    offset: int
    bytes: int
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """The language model, as far as the runtime must know it."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    eos_ids: tuple[int, ...]


@dataclass(frozen=True)
class Images:
    """What becomes of a picture.

    tokens       the most that one picture gives
    grid         rows x columns of patches, where all pictures have the same: with one token more
                 than patches the first is the class token; with one less, the first patch has none;
                 () where it depends on the picture
    size         height and width that the vision graph takes, () likewise
    apart        the graph computes each unit (tile) on its own, so that any number can be given
    shared_rows  rows at the start of its output that are the same for all pictures
    deep         how many of the language model's first blocks have image features of their own
                 added to what they give (DeepStack); a token's features hold these, too
    most         of each dynamic dimension of the vision graph, what one picture can need
    positions    rotary positions of the prompt's tokens: one after the other, or three each (time,
                 row and column, M-RoPE)
    """

    token: str
    token_id: int
    tokens: int
    grid: tuple[int, ...]
    size: tuple[int, ...]
    processor: dict[str, Any]
    apart: bool = True
    shared_rows: int = 0
    positions: Literal["sequence", "grid"] = "sequence"
    deep: int = 0
    most: dict[str, int] = field(default_factory=lambda: {"units": 1})


@dataclass(frozen=True)
class Reduction:
    """One shortening of the image tokens, at the input of block ``layer``.

    Of V image tokens of a picture, max(1, round(V * ratio)) stay, where the ratio is ``ratio`` or
    keep ** ``exponent``. ``recycle`` is the part of those that absorb discarded ones (schedule.py).
    """

    layer: int
    exponent: float | None
    ratio: float | None
    recycle: float | None


@dataclass(frozen=True)
class Compression:
    """How the cache is kept short; budgets.py computes every count from it.

    keep       fraction of a layer's entries that stays; a call may ask for less
    profile    rows of a PrefixKV profile by rising keep, interpolated between; (): all layers alike
    cap        most entries a layer may keep, None: as many as the fraction gives
    floor      entries that the fraction never goes below
    sinks      first tokens, which always stay
    recent     last tokens, which stay when a prompt or an interval is compacted
    distance   elimination one by one at the fixed point, this far before the end of what is kept of
               the prompt; None: compaction of many at a time
    interval   steps from one run of compact.onnx to the next; None: elimination one by one
    queries    most recent queries that each layer remembers, whose attention scores the entries
    positions  of new tokens: the true ones, or the length of layer 0's cache (released code)
    semantics  the papers' rules, or the released code's (parity tests only)
    """

    keep: float
    profile: tuple[ProfileRow, ...]
    cap: int | None
    floor: int
    sinks: int
    recent: int
    distance: int | None
    interval: int | None
    queries: int
    positions: Literal["true", "layer0"]
    semantics: Literal["paper", "reference"]


@dataclass(frozen=True)
class ProfileRow:
    """The fraction each layer keeps when ``keep`` of all entries are kept; their mean is keep."""

    keep: float
    fractions: tuple[float, ...]


@dataclass(frozen=True)
class Capacity:
    """Cache entries per layer for ``max_text_len`` text tokens (prompt and answer) and
    ``max_images`` pictures at the exported ratios."""

    max_text_len: int
    max_images: int
    per_layer: tuple[int, ...]


@dataclass(frozen=True)
class Quantization:
    """The language model's products are stored in ``bits``, with a scale per ``block`` inputs."""

    bits: int
    block: int


@dataclass(frozen=True)
class Manifest:
    """``dtype`` is what the graphs compute in; the cache may be narrower, and so may weights.
    ``generation`` is what generation_config.json says that changes an answer
    (generation_config.py)."""

    schema: int
    family: str
    model: dict[str, Any]
    recipe: str
    parameters: dict[str, Any]
    dtype: Literal["float32", "float16", "bfloat16"]
    cache_dtype: Literal["float32", "float16", "bfloat16"]
    quantization: Quantization | None
    graphs: dict[str, Graph]
    weights: dict[str, Weight]
    text: Text
    images: Images
    keep: float
    reductions: tuple[Reduction, ...]
    compression: Compression | None
    capacity: Capacity
    chat_template: str | None
    special_tokens: dict[str, str]
    validation: str
    tools: dict[str, str]
    files: dict[str, File]
    generation: dict[str, Any] = field(default_factory=dict)

    @property
    def feature_width(self) -> int:
        """Numbers that the vision graph gives per image token."""
        return self.text.hidden * (1 + self.images.deep)

    def write(self, folder: Path) -> None:
        data = dataclasses.asdict(self) | {"schema": SCHEMA}
        text = json.dumps(data, indent=1, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_bundle(folder: str | Path, *, verify: bool = True) -> Manifest:
    """The checked manifest of a bundle; BundleError says what is wrong with it.

    ``verify`` compares every listed file with its hash (skipped for files already verified that
    have kept size and time); without it they must still be there, inside, and of the right size.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        what = "is not a bundle (no lvlm.json in it)" if folder.is_dir() else "does not exist"
        raise BundleError(f"{folder} {what}; make one with lvlm-export -o {folder}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read ({error}); export the bundle again") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema not in READABLE or isinstance(schema, bool):
        raise BundleError(
            f"{path} has schema {schema!r}, this version reads {READABLE[0]} and {SCHEMA}; "
            "export again with this version or install the one that wrote it"
        )
    manifest = decode(Manifest, data, path.name)
    _check(manifest, path)
    check_files(folder, manifest.files, "sample" if verify else "none")
    return manifest


def _check(manifest: Manifest, path: Path) -> None:
    """What types alone cannot say."""
    graphs = [f for g in manifest.graphs.values() for f in (g.file, *g.lowered.values())]
    missing = {"vision", "prefill", "decode"} - set(manifest.graphs)
    if missing:
        raise BundleError(f"{path} lists no {', '.join(sorted(missing))} graph; export again")
    if unlisted := set(graphs) - set(manifest.files):
        raise BundleError(f"{path} has no hash for {', '.join(sorted(unlisted))}; export again")
    _check_weights(manifest, path)
    layers = manifest.text.layers
    if len(manifest.capacity.per_layer) != layers:
        raise BundleError(f"{path} lists capacities for another number of layers than {layers}")
    images, capacity = manifest.images, manifest.capacity
    sizes = (
        *dataclasses.astuple(manifest.text)[:6],
        *(images.tokens, *images.grid, *images.size, *images.most.values()),
        *(capacity.max_text_len, capacity.max_images, *capacity.per_layer),
    )
    if min(sizes) < 1 or not 0 < manifest.keep <= 1:
        raise BundleError(f"{path} has a size or keep ratio out of range; export again")
    if (q := manifest.quantization) is not None and (q.bits not in (4, 8) or q.block < 1):
        raise BundleError(
            f"{path} has weights of {q.bits} bits in blocks of {q.block}; export again"
        )
    if len(images.grid) not in (0, 2) or len(images.size) not in (0, 2):
        raise BundleError(f"{path}: images need a grid and a size of two numbers, or none")
    if images.shared_rows < 0 or not 0 <= images.deep < layers:
        raise BundleError(
            f"{path}: images share {images.shared_rows} rows and enter {images.deep} blocks more; "
            "export again"
        )
    _check_reductions(manifest.reductions, layers, path)
    if manifest.compression is not None:
        _check_compression(manifest.compression, layers, path)


def _check_weights(manifest: Manifest, path: Path) -> None:
    """Every graph's weights are listed, and lie inside their files."""
    if unknown := {w for g in manifest.graphs.values() for w in g.weights} - set(manifest.weights):
        raise BundleError(f"{path} does not list the weight {min(unknown)!r}; export again")
    for name, w in manifest.weights.items():
        size = manifest.files[w.file].bytes if w.file in manifest.files else 0
        if min(w.offset, w.bytes, *w.dims, 0) < 0 or w.offset + w.bytes > size:
            raise BundleError(f"{path}: the weight {name!r} lies outside its file; export again")


def _check_reductions(reductions: tuple[Reduction, ...], layers: int, path: Path) -> None:
    stages = [r.layer for r in reductions]
    if any(not 0 < layer < layers for layer in stages) or stages != sorted(set(stages)):
        raise BundleError(f"{path} reduces tokens at layers {stages} of {layers}; export again")
    for r in reductions:
        # NaN fails every comparison
        fractions = [x for x in (r.ratio, r.recycle) if x is not None]
        steps = [x for x in (r.exponent,) if x is not None]
        usable = all(0 < x <= 1 for x in fractions) and all(0 < x < math.inf for x in steps)
        if not usable or (r.ratio is None) == (r.exponent is None):
            raise BundleError(f"{path} has a reduction out of range ({r}); export again")
    if len({r.ratio is None for r in reductions}) > 1:
        raise BundleError(f"{path} mixes reductions with and without own ratio; export again")


def _check_compression(c: Compression, layers: int, path: Path) -> None:
    keeps, shares = [row.keep for row in c.profile], [row.fractions for row in c.profile]
    means = [math.fsum(row) / layers for row in shares]
    fits = {
        "keep": 0 < c.keep <= 1,
        "profile": keeps == sorted(set(keeps)) and all(len(row) == layers for row in shares),
        "profile's fractions": all(0 < x <= 1 for row in (keeps, *shares) for x in row),
        "profile's means": all(abs(m - k) <= 1e-6 for m, k in zip(means, keeps, strict=True)),
        "cap": c.cap is None or c.cap >= c.sinks + c.recent,
        "floor": c.floor >= 0 and (c.floor == 0 or c.interval is not None),
        "sinks or recent": min(c.sinks, c.recent - c.queries) >= 0 < c.sinks + c.recent,
        "distance": (c.distance or 0) >= 0 and (c.distance is None) != (c.interval is None),
        "interval": c.interval is None or c.interval > 0,
        "queries": c.queries >= 0 and (c.queries > 0) == (c.interval is not None),
        "semantics": c.semantics == "paper" or c.interval is None,
    }
    if wrong := ", ".join(name for name, fit in fits.items() if not fit):
        raise BundleError(f"{path} has a cache compression out of range ({wrong}); export again")


def decode(kind: type[T], data: Any, where: str) -> T:
    """``data`` (from JSON) as the typed ``kind``; BundleError names the field that does not fit."""
    return typing.cast(T, _decode(kind, data, where))


def _required(kind: Any) -> set[str]:
    """The fields without a default, which earlier schemas lack."""
    defaults = {f.name: (f.default, f.default_factory) for f in dataclasses.fields(kind)}
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    return {name for name, default in defaults.items() if default == absent}


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(data, Mapping):
            raise BundleError(f"{where} is not an object; export the bundle again")
        hints = typing.get_type_hints(kind)
        if unknown := set(data) - set(hints):
            raise BundleError(f"{where}: unknown field '{min(unknown)}'; export the bundle again")
        if missing := _required(kind) - set(data):
            raise BundleError(f"{where}: missing field '{min(missing)}'; export the bundle again")
        return kind(**{k: _decode(hints[k], v, f"{where}.{k}") for k, v in data.items()})
    if origin is tuple and isinstance(data, list):
        return tuple(_decode(arguments[0], x, f"{where}[{i}]") for i, x in enumerate(data))
    if origin is dict and isinstance(data, Mapping):
        return {str(k): _decode(arguments[1], v, f"{where}.{k}") for k, v in data.items()}
    if origin is Literal and data in arguments:
        return data
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            if option is type(None) and data is None:
                return None
            if option is not type(None):
                try:
                    return _decode(option, data, where)
                except BundleError:
                    continue
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    fits = isinstance(kind, type) and isinstance(data, kind)
    if fits and isinstance(data, bool) == (kind is bool):  # to Python, True is a whole number
        return data
    raise BundleError(f"{where} holds {data!r}, which does not fit; export the bundle again")
