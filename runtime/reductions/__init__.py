"""Image tokens chosen behind the vision graph, on the host: which of an image's go on.

A file of this folder with a ``RULE`` is one way to choose (the protocol below); recipes name it
(export/recipes/parts/at_encoder.py), manifests record it. Choosing is a few milliseconds beside the
tower's (docs/recipes.md), so that no graph has a loop for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lvlm.core.discovery import discover
from lvlm.core.errors import ParameterError, shown


class Rule(Protocol):
    """A way to choose; any thread may ask it."""

    @property
    def name(self) -> str: ...

    @property
    def scored(self) -> bool:
        """True where it asks for scores of the vision tower's."""

    @property
    def temporal(self) -> bool:
        """True where it looks at the frame before, of videos: it is a TemporalRule."""

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ParameterError for settings that ``reduce`` does not take."""

    def reduce(
        self, features: np.ndarray, scores: np.ndarray | None, count: int, **settings: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that go on: indices int64 [count], rising, and features float32 [count,D].

        Args:
            features: float32 [V,D], of one run of image tokens.
            scores: float32 [V,1+K] for a rule that is scored: the attention that each token gets in
                the tower, and its key there, the mean over the heads. For a rule that is temporal:
                the features of the frame before.
            count: 1 to V.
            settings: as the recipe has them.
        """


class TemporalRule(Rule, Protocol):
    """A rule that looks at the frame before, of videos."""

    def shared(
        self, frames: Sequence[np.ndarray], tokens: Sequence[int], total: int
    ) -> Sequence[int]:
        """Number of tokens of each frame that go on, known before any is encoded.

        Args:
            frames: the pixels of every frame of a video, as the vision graph takes them.
            tokens: V of every frame.
            total: as many of all together as go on, or more where the rule needs them.
        """


class Chosen(ABC):
    """The base of rules that leave the tokens they choose as they are."""

    name: str
    scored = False
    temporal = False

    def check(self, settings: Mapping[str, Any]) -> None:
        no_others(self.name, settings)

    @abstractmethod
    def choose(self, features: np.ndarray, count: int) -> np.ndarray:
        """Indices int64 [count] of the tokens that stay, rising."""

    def reduce(
        self, features: np.ndarray, scores: np.ndarray | None, count: int, **settings: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        del scores
        rows = self.choose(features, count, **settings)
        return rows, features[rows]


def no_others(rule: str, settings: Mapping[str, Any], known: Collection[str] = ()) -> None:
    """ParameterError for a setting that is none of those ``known``."""
    if unknown := set(settings) - set(known):
        raise ParameterError(f"rule {rule} takes no {shown(min(unknown))}; leave it out")


def rules() -> dict[str, Rule]:
    """Every rule by its name."""
    return discover("lvlm.runtime.reductions", "RULE")
