"""What is evaluated: rows of bundles and fractions, and what they are held against."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from evaluation_tools import without_compression

from lvlm.calibration.evaluate.variants import Bundle, reference_of, variants
from lvlm.core.errors import ParameterError


def test_rows_of_bundles(full: Bundle, light: Bundle, uniform: Bundle) -> None:
    def rows(
        bundles: list[Bundle], keeps: list[float], kv_keeps: list[float]
    ) -> list[tuple[Any, ...]]:
        found = variants(bundles, keeps, kv_keeps)
        return [(v.bundle.label, v.setting, v.keep, v.kv_keep, v.wanted) for v in found]

    merging = without_compression(light)
    u, m = uniform.label, light.label
    assert rows([full, uniform], [], []) == [
        ("full", "full cache", None, None, None),
        (u, "as exported", None, None, None),
    ]
    assert rows([full, uniform, light, merging], [0.2, 0.5], []) == [
        ("full", "full cache", None, None, None),
        (u, "keep 0.2", None, 0.2, None),
        (u, "keep 0.5", None, 0.5, None),
        (m, "keep 0.2", None, 1.0, 0.2),
        (m, "keep 0.5", None, 1.0, 0.5),
        (m, "keep 0.2", None, None, 0.2),
        (m, "keep 0.5", None, None, 0.5),
    ]
    assert rows([light], [0.2], [0.5]) == [
        (m, "keep 0.2", None, 1.0, 0.2),
        (m, "kv-keep 0.5", 1.0, 0.5, None),
    ]
    assert rows([uniform, light, merging], [], [0.5]) == [
        (u, "as exported", None, None, None),
        (m, "kv-keep 0.5", 1.0, 0.5, None),
        (m, "as exported", None, None, None),
    ]


def test_fractions_that_cannot_be_taken(full: Bundle, light: Bundle, uniform: Bundle) -> None:
    with pytest.raises(ParameterError, match="full keeps the full cache"):
        variants([full], [0.5], [])
    with pytest.raises(ParameterError, match="merge tokens and also compress"):
        variants([without_compression(light), uniform], [], [0.5])
    fixed = dataclasses.replace(light.manifest.reductions[0], exponent=None, ratio=0.5)
    manifest = dataclasses.replace(light.manifest, reductions=(fixed,))
    scheduled = dataclasses.replace(light, manifest=manifest)
    with pytest.raises(ParameterError, match="schedule of its own"):
        variants([scheduled], [0.5], [])
    assert variants([scheduled], [], [])[0].setting == "as exported"


def test_the_reference_is_the_full_cache_of_the_same_model(full: Bundle, light: Bundle) -> None:
    half = dataclasses.replace(full, manifest=dataclasses.replace(full.manifest, dtype="float16"))
    other = dataclasses.replace(
        full, manifest=dataclasses.replace(full.manifest, model={"source": "other"})
    )
    assert reference_of(light, [light, other, half, full]) is full
    assert reference_of(light, [half]) is half
    with pytest.raises(ParameterError, match="--reference"):
        reference_of(light, [light, other])
