"""What an export is said to need, and what the machine is said to have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lvlm.core.discovery import discover
from lvlm.export import estimates
from lvlm.export.export_options import ExportOptions
from lvlm.export.recipes.recipe import parse_settings

GB = 10**9


def peak(recipe: str = "none", validate: bool = False, dtype: torch.dtype = torch.float16) -> int:
    """Of a model of 7 G parameters."""
    kind = discover("lvlm.export.recipes", "RECIPE")[recipe]
    return estimates.peak_memory(
        ExportOptions("m", parse_settings(kind, []), Path("out")),
        weight_bytes=7 * GB * dtype.itemsize,
        largest=131_000_000,
        dtype=dtype,
        validate=validate,
    )


def test_without_validation_no_part_grows_with_the_model() -> None:
    assert peak() < 2 * GB
    assert peak() < peak(dtype=torch.float32) < 2 * GB


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_validation_and_no_profile_of_7b_takes_more_than_4_gb(dtype: torch.dtype) -> None:
    assert peak(dtype=dtype) < peak(validate=True, dtype=dtype) <= 4 * GB
    assert peak("prefixkv", dtype=dtype) <= 4 * GB


def test_measuring_a_profile_grows_with_the_largest_parameter_alone() -> None:
    assert estimates.running_memory(131_000_000) <= 4 * GB


def test_time_is_that_of_the_figures_it_comes_from() -> None:
    """LLaVA-1.5-7B with lightvlm: 127 s without a comparison, of 459 s; tiny-llava: 26 s."""
    large = estimates.ExportWork(4, 32, int(14.1e9), copied=False, quantized=False, runs=0)
    assert large.seconds == pytest.approx(127, rel=0.2)
    checked = replace(large, runs=1).seconds - large.seconds
    assert checked == pytest.approx(459, rel=0.2)
    tiny = estimates.ExportWork(4, 6, int(7.4e6), copied=True, quantized=False, runs=1)
    assert tiny.seconds == pytest.approx(26, rel=0.2)
    assert replace(large, copied=True).seconds == replace(large, quantized=True).seconds
    assert replace(large, copied=True).seconds > 1.5 * large.seconds


def test_the_container_counts_where_it_has_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "CGROUP", tmp_path)
    machine = estimates.free_memory()
    for name, text in (
        ("memory.max", "3000000"),
        ("memory.current", "2500000"),
        ("memory.stat", "anon 1\ninactive_file 700000"),
    ):
        (tmp_path / name).write_text(text)
    assert estimates.free_memory() == 1_200_000
    (tmp_path / "memory.max").write_text("max")
    after = estimates.free_memory()
    assert (machine is None) == (after is None)
    assert after is None or after > 1_200_000
