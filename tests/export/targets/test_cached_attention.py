"""Decode's attention in the target ort-cpu: the kernel computes what its function does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from lowered_nodes import (
    CACHED,
    CACHED_NODES,
    assert_entries,
    cached_inputs,
    cached_model,
    tolerance_of,
)
from single_node import session

from lvlm.export.targets.passes.ort_attention import APPENDED, READ


@pytest.mark.parametrize(("name", "case"), CACHED_NODES, ids=str)
def test_kernel_computes_the_function(name: str, case: tuple[Any, ...], kernels: Path) -> None:
    feeds = cached_inputs(name, case)
    expected = session(cached_model(name, feeds, case, function=True)).run(None, feeds)
    found = session(cached_model(name, feeds, case), kernels).run(None, feeds)
    tolerance = tolerance_of(case, 2e-3)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=tolerance)
    for have, want in zip(found[1:], expected[1:], strict=True):
        for row, count in enumerate(case[5]):  # what lies beyond the valid means nothing
            assert_entries(have[row, :, :count], want[row, :, :count], tolerance)


@pytest.mark.parametrize("form", ["function", "kernel"])
@pytest.mark.parametrize("place", ["new key", "new value", "key", "value"])
def test_an_entry_in_8_bits_that_is_not_finite_is_noticed(
    place: str, form: str, request: pytest.FixtureRequest
) -> None:
    """In its own row alone, as in a cache of floats."""
    case: tuple[Any, ...] = (2, 1, 16, "float32", "int8", [3, 300])
    name = APPENDED if place.startswith("new") else READ
    feeds = cached_inputs(name, case)
    if name == APPENDED:
        feeds["qkv"][1, 0, 32 if place == "new key" else 48] = np.inf
    else:
        feeds[place][1, 0, 7, -1] = 127
    library = request.getfixturevalue("kernels") if form == "kernel" else None
    model = cached_model(name, feeds, case, function=form == "function")
    output = session(model, library).run(["output"], feeds)[0]
    assert np.isfinite(output[0]).all()
    assert np.isnan(output[1]).all()


def test_a_cache_that_is_bound_in_place_is_written_in_place(kernels: Path) -> None:
    case = CACHED[0]
    feeds = cached_inputs(APPENDED, case)
    model = cached_model(APPENDED, feeds, case, function=True)
    expected = session(model).run(None, feeds)
    runner = session(model, kernels)
    binding = runner.io_binding()
    before = feeds["past_key"].copy()
    for which in ("key", "value"):
        cache = onnxruntime.OrtValue.ortvalue_from_numpy(feeds.pop(f"past_{which}"))
        binding.bind_ortvalue_input(f"past_{which}", cache)
        binding.bind_ortvalue_output(f"present_{which}", cache)
        feeds[f"present_{which}"] = cache
    for name in list(feeds):
        if not name.startswith("present"):
            binding.bind_cpu_input(name, feeds[name])
    binding.bind_output("output")
    runner.run_with_iobinding(binding)
    np.testing.assert_allclose(binding.get_outputs()[2].numpy(), expected[0], rtol=0, atol=3e-6)
    key = feeds["present_key"].numpy()
    for row, count in enumerate(case[5]):
        np.testing.assert_array_equal(key[row, :, count:], before[row, :, count:])
        np.testing.assert_allclose(key[row, :, :count], expected[1][row, :, :count], atol=1e-6)
