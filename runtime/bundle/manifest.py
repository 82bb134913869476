"""The manifest ``lvlm.json`` of a bundle: what is in its folder, and what it must be run with.

The exporter writes these types, the runtime reads them (reader.py).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from lvlm.core.integrity import File
from lvlm.runtime.bundle.entry_form import side_dtype
from lvlm.runtime.policies.policy import CachePolicy

SCHEMA = 8
MANIFEST = "lvlm.json"


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
    """Place of a tensor: ``bytes`` of ``file`` from ``offset`` on, row-major."""

    file: str
    offset: int
    bytes: int
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """The language model, as far as the runtime must know it.

    ``layers`` are those that attend, each with a cache of entries. ``states``: sizes of what a row
    keeps for the others whatever its length, (layers,n,D) of those that convolve: n inputs each.
    With linear attention a second one: (layers,heads * key size,value size). ``state_dtypes``: of
    each; bundles without them have states of the cache's. ``bidirectional``: a prompt's tokens see
    those of it that follow, so that none is read before all are there.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    eos_ids: tuple[int, ...]
    states: tuple[tuple[int, ...], ...] = ()
    state_dtypes: tuple[str, ...] = ()
    bidirectional: bool = False

    def state_forms(self, cache_dtype: str) -> list[tuple[tuple[int, ...], str]]:
        """Sizes and type of each state."""
        types = self.state_dtypes or (side_dtype(cache_dtype),) * len(self.states)
        return list(zip(self.states, types, strict=True))


@dataclass(frozen=True)
class Images:
    """Image inputs of a bundle.

    token              what stands for an image in a prompt
    token_id           each of the image's own tokens, which ``token`` is replaced by
    tokens             the most that one image gives
    grid               rows x columns of patches, where all images have the same: with one token
                       more than patches the first is the class token; with one less, the first
                       patch has none; () where it depends on the image
    size               height and width that the vision graph takes, () likewise
    independent_units  the graph computes each unit (tile) on its own, so that any number can be
                       given
    shared_rows        rows at the start of its output that are the same for all images
    positions          rotary positions of the prompt's tokens: one after the other, or three each
                       (time, row and column, M-RoPE)
    deepstack_layers   how many of the language model's first blocks have image features of their
                       own added to their output (DeepStack); a token's features hold these, too
    max_dims           the largest that one image needs of each dynamic dimension of the graph
    as_text            the text of an image (PreparedImage) takes the place of ``token`` before the
                       prompt is tokenized, which may join it with what is beside it; else its
                       tokens take the place of ``token_id`` afterwards
    bidirectional      tokens of an image, between which there is no text, see those that follow
    patches            of one image in the vision tower, the most, where these are many; else 0
    patch_heads        in how many heads these attend to one another; 0 likewise
    """

    token: str
    token_id: int
    tokens: int
    grid: tuple[int, ...]
    size: tuple[int, ...]
    processor: dict[str, Any]
    independent_units: bool = True
    shared_rows: int = 0
    positions: Literal["sequence", "grid"] = "sequence"
    deepstack_layers: int = 0
    max_dims: dict[str, int] = field(default_factory=lambda: {"units": 1})
    as_text: bool = False
    bidirectional: bool = False
    patches: int = 0
    patch_heads: int = 0


@dataclass(frozen=True)
class Reduction:
    """One shortening of the image tokens, at the input of block ``layer``.

    Of V image tokens of an image, max(1, round(V * ratio)) stay, where the ratio is ``ratio`` or
    keep ** ``exponent``. ``recycle`` is the part of those that absorb discarded ones
    (image_tokens.py).
    """

    layer: int
    exponent: float | None
    ratio: float | None
    recycle: float | None


@dataclass(frozen=True)
class EncoderReduction:
    """A shortening of the image tokens before block 0, on the host: ``rule`` (runtime/reductions),
    with its ``settings``, chooses which stay. Of V as many as of a Reduction.

    places  positions of those that stay: their own, as in the whole image, or closed up, as if the
            image had no more
    scores  numbers per token that the vision graph gives besides: how much the tower attends to it,
            then its key there; 0 where the rule asks for none
    """

    rule: str
    exponent: float | None
    ratio: float | None
    places: Literal["own", "closed"] = "own"
    settings: dict[str, Any] = field(default_factory=dict)
    scores: int = 0
    layer: ClassVar[int] = 0
    recycle: ClassVar[None] = None


@dataclass(frozen=True)
class Capacity:
    """Cache entries per layer for ``max_text_len`` text tokens (prompt and answer) and
    ``max_images`` images at the exported ratios."""

    max_text_len: int
    max_images: int
    per_layer: tuple[int, ...]


@dataclass(frozen=True)
class Quantization:
    """Storage of the model's linear layers: ``bits``, with a scale per ``block`` inputs."""

    bits: int
    block: int


@dataclass(frozen=True)
class Manifest:
    """``dtype`` is what the graphs compute in; the cache may be narrower, and so may weights.
    ``generation`` is what generation_config.json says that changes an answer
    (generation_config.py). ``question_free``: what is cached of a prompt up to the end of its
    last image depends on nothing that follows, so that it serves other questions, too.
    ``encoder``: tokens that do not get to the language model."""

    schema: int
    family: str
    model: dict[str, Any]
    recipe: str
    parameters: dict[str, Any]
    dtype: Literal["float32", "float16", "bfloat16"]
    cache_dtype: Literal["float32", "float16", "bfloat16", "int8"]
    quantization: Quantization | None
    graphs: dict[str, Graph]
    weights: dict[str, Weight]
    text: Text
    images: Images
    keep: float
    reductions: tuple[Reduction, ...]
    cache_policy: CachePolicy | None
    capacity: Capacity
    chat_template: str | None
    special_tokens: dict[str, str]
    validation: str
    tools: dict[str, str]
    files: dict[str, File]
    generation: dict[str, Any] = field(default_factory=dict)
    question_free: bool = False
    encoder: EncoderReduction | None = None

    @property
    def shortenings(self) -> tuple[EncoderReduction | Reduction, ...]:
        """All that shortens images, in the order in which it does."""
        return (*filter(None, (self.encoder,)), *self.reductions)

    @property
    def in_place(self) -> bool:
        """True where every token's entries lie at its own place and depend on nothing but the
        tokens before it: no reductions, no cache policy."""
        return not self.reductions and self.cache_policy is None

    @property
    def feature_width(self) -> int:
        """Numbers that the vision graph gives per image token."""
        return self.text.hidden * (1 + self.images.deepstack_layers)

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(self.text_form(), encoding="utf-8")

    def text_form(self) -> str:
        """The text of lvlm.json."""
        data = dataclasses.asdict(self) | {"schema": SCHEMA}
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"
