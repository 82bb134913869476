"""An image as its model takes it: the inputs of the vision graph, and which of the rows that the
graph gives become the image's tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lvlm.runtime.reductions.token_choice import TokenChoice

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class ImageTokens(NamedTuple):
    """The tokens of an image that the language model reads: features [K,D], indices int64 [K]."""

    features: np.ndarray
    indices: np.ndarray


@dataclass(frozen=True)
class PreparedImage:
    """An image as its model takes it.

    arrays  inputs of the vision graph by name; the first axis counts units: tiles, or patches
    rows    how many rows [rows,D] the graph gives for them, besides those that all images share
            (Images.shared_rows, which come first)
    index   int64 [V,k]: token t is made of the rows index[t]
    weight  float32 [V,k], how much of each; None where k is 1: the row as it is
    text    what stands for the image in the prompt, V image tokens among it; None: only those
    offsets int64 [3,V] and span: with three rotary positions per token (Images.positions grid),
            those of the image's tokens relative to the position where it begins, and by how much
            what follows is further on
    size    height and width before it was prepared, where the family's model in transformers asks
    choice  which of the V tokens go on to the language model; None: all
    before  the frame before it of the same video
    box     left, top, right and bottom of what was prepared, in widths and heights of the image:
            0, 0, 1, 1 is all of it; less where it was cropped, more where it was padded
    grid    int [R,C]: of a grid over the box, the token at each place, -1: none; None: that of
            Images.grid, or none is known
    """

    arrays: Mapping[str, np.ndarray]
    rows: int
    index: np.ndarray
    weight: np.ndarray | None = None
    text: str | None = None
    offsets: np.ndarray | None = None
    span: int = 0
    size: tuple[int, ...] = ()
    choice: TokenChoice | None = None
    before: PreparedImage | None = None
    box: Box = WHOLE
    grid: np.ndarray | None = None

    @property
    def asks_before(self) -> PreparedImage | None:
        """The frame before, where the choice looks at it."""
        temporal = self.choice is not None and self.choice.temporal
        return self.before if temporal else None

    @property
    def tokens(self) -> int:
        """V, whatever goes on."""
        return len(self.index)

    @property
    def units(self) -> int:
        return len(next(iter(self.arrays.values())))

    def features(self, rows: np.ndarray) -> np.ndarray:
        """Features [V,D] of the image's ``rows`` [shared + rows,D], of their dtype (bf16 as its
        bits)."""
        if self.weight is None:
            taken: np.ndarray = rows[self.index[:, 0]]
            return taken
        wide = _widened(rows)
        mixed = np.zeros((self.tokens, rows.shape[1]), np.float32)
        for part in range(self.index.shape[1]):
            mixed += self.weight[:, part : part + 1] * wide[self.index[:, part]]
        return _rounded_to(mixed, rows.dtype)

    def chosen(
        self,
        features: np.ndarray,
        scores: np.ndarray | None = None,
        before: np.ndarray | None = None,
    ) -> ImageTokens:
        """Image tokens that go on to the language model, of the ``features`` [V,D] and, where its
        choice asks for them, the tower's ``scores`` [V,S], or the features of the frame
        ``before``."""
        if self.choice is None:
            return ImageTokens(features, np.arange(self.tokens))
        if before is not None:
            scores = _widened(before)
        rows, made = self.choice.reduce(_widened(features), scores)
        return ImageTokens(_rounded_to(made, features.dtype), rows)

    def digest(self) -> bytes:
        """Names the image by its content as the language model sees it."""
        found = hashlib.sha256()
        parts = [*sorted(self.arrays.items()), ("index", self.index)]
        if self.offsets is not None:  # frames have them by their time
            parts += [("offsets", self.offsets), ("span", np.array(self.span))]
        if self.choice is not None:
            found.update(repr(self.choice).encode())
        if (before := self.asks_before) is not None:
            parts += [(f"before {name}", array) for name, array in sorted(before.arrays.items())]
        for name, array in parts:
            found.update(repr((name, array.shape, array.dtype.str)).encode())
            found.update(np.ascontiguousarray(array).tobytes())
        return found.digest()


def _widened(rows: np.ndarray) -> np.ndarray:
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32)


def _rounded_to(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype != np.uint16:
        return rows.astype(dtype)
    bits = rows.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to the nearest, even
