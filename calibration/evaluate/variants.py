"""Variants of an evaluation: bundles, each with the settings of its calls, and the full cache they
are compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lvlm.core.errors import ParameterError
from lvlm.core.integrity import Verify
from lvlm.runtime.bundle.manifest import MANIFEST, Manifest
from lvlm.runtime.bundle.reader import read_bundle


@dataclass(frozen=True)
class Bundle:
    """A bundle to evaluate; ``digest`` is its manifest's, which lists the hash of every file."""

    label: str
    folder: Path
    manifest: Manifest
    digest: str

    @classmethod
    def read(cls, folder: Path, label: str | None = None, verify: Verify = "none") -> Bundle:
        """Loading looks at the files' hashes, too. Raises BundleError."""
        manifest = read_bundle(folder, verify)
        digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        return cls(label or str(folder), folder, manifest, digest)

    @property
    def is_full(self) -> bool:
        """True where every token keeps its entry in every layer: what others are compared with."""
        return not self.manifest.shortenings and self.manifest.cache_policy is None


@dataclass(frozen=True)
class Variant:
    """One row of the results: a bundle and the options of its calls (None: as exported).

    With ``wanted`` set, ``keep`` is solved for each prompt so that this fraction of the cache is
    left after prefill (fit.py).
    """

    bundle: Bundle
    setting: str
    keep: float | None = None
    kv_keep: float | None = None
    wanted: float | None = None

    @property
    def name(self) -> str:
        return f"{self.bundle.label} {self.setting}"


def variants(
    bundles: Sequence[Bundle], keeps: Sequence[float], kv_keeps: Sequence[float]
) -> list[Variant]:
    """The rows of every bundle: one for the full cache, one as exported, or one per fraction.

    ``keeps`` are fractions of the cache left after prefill. A bundle that merges tokens reaches
    them by merging alone; its own cache compression has rows by ``kv_keeps``, without merging.
    Raises ParameterError for fractions that no bundle can take, or a bundle cannot.
    """
    if keeps and all(b.is_full for b in bundles):
        raise ParameterError(
            f"--keep: {bundles[0].label} keeps the full cache; add a bundle with compression"
        )
    if kv_keeps and not any(_merges_and_compresses(b) for b in bundles):
        raise ParameterError(
            "--kv-keep is for bundles that merge tokens and also compress the cache (lightvlm), "
            "and there is none; use --keep for the others"
        )
    return [row for bundle in bundles for row in _rows(bundle, keeps, kv_keeps)]


def _rows(bundle: Bundle, keeps: Sequence[float], kv_keeps: Sequence[float]) -> list[Variant]:
    if bundle.is_full:
        return [Variant(bundle, "full cache")]
    manifest = bundle.manifest
    if (keeps or kv_keeps) and any(r.ratio is not None for r in manifest.shortenings):
        raise ParameterError(
            f"{bundle.label} was exported with a schedule of its own, which --keep and --kv-keep "
            "cannot change; evaluate it without them"
        )
    if manifest.shortenings:
        whole = None if manifest.cache_policy is None else 1.0
        rows = [Variant(bundle, f"keep {k:g}", kv_keep=whole, wanted=k) for k in keeps]
    else:
        rows = [Variant(bundle, f"keep {k:g}", kv_keep=k) for k in keeps]
    if _merges_and_compresses(bundle):
        rows += [Variant(bundle, f"kv-keep {k:g}", keep=1.0, kv_keep=k) for k in kv_keeps]
    return rows or [Variant(bundle, "as exported")]


def _merges_and_compresses(bundle: Bundle) -> bool:
    return bool(bundle.manifest.shortenings) and bundle.manifest.cache_policy is not None


def reference_of(bundle: Bundle, candidates: Sequence[Bundle]) -> Bundle:
    """The full-cache bundle of the same model, of the same precision if there is a choice.

    Raises ParameterError if there is none.
    """
    same = [c for c in candidates if c.is_full and c.manifest.model == bundle.manifest.model]
    same.sort(key=lambda c: c.manifest.dtype != bundle.manifest.dtype)
    if not same:
        raise ParameterError(
            f"rouge compares {bundle.label} with the full cache of the same model, and there is "
            "no such bundle; give one with --reference, add none to --recipes, or choose other "
            "--metrics"
        )
    return same[0]
