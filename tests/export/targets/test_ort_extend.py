"""Extend's attention in the target ort-cpu: one node, whose kernel computes its function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from lowered_nodes import (
    EXTENDED,
    EXTENDED_SLOTS,
    assert_entries,
    extended_inputs,
    extended_model,
    tolerance_of,
)
from settings import CACHED
from single_node import session

from lvlm.export.targets.passes.ort_extend import INPUTS, NAME, OUTPUTS
from lvlm.runtime.bundle.reader import read_bundle


@pytest.mark.parametrize("slots", ["in order", "anywhere"])
@pytest.mark.parametrize("case", EXTENDED, ids=str)
def test_kernel_computes_the_function(case: tuple[Any, ...], slots: str, kernels: Path) -> None:
    feeds = extended_inputs(case, slots)
    expected = session(extended_model(feeds, case, function=True)).run(None, feeds)
    model = extended_model(feeds, case)
    found = session(model, kernels).run(None, feeds)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=tolerance_of(case, 4e-3))
    for have, want in zip(found[1:], expected[1:], strict=True):
        assert_entries(have, want, 3e-6 if case[4] == "float32" else 4e-3)
    for have, more in zip(found, session(model, kernels, 3).run(None, feeds), strict=True):
        np.testing.assert_array_equal(have, more)


@pytest.mark.parametrize("form", ["function", "kernel"])
def test_an_entry_in_8_bits_that_is_not_finite_is_noticed(
    form: str, request: pytest.FixtureRequest
) -> None:
    case: tuple[Any, ...] = (2, 1, 16, "float32", "int8", 3, [20, 9])
    feeds = extended_inputs(case)
    feeds["past_key"][1, 0, 4, -1] = 127
    library = request.getfixturevalue("kernels") if form == "kernel" else None
    model = extended_model(feeds, case, function=form == "function")
    output = session(model, library).run(["output"], feeds)[0]
    assert np.isfinite(output[0]).all()
    assert np.isnan(output[1]).all()


def test_a_cache_bound_in_place_is_written_in_place(kernels: Path) -> None:
    case = EXTENDED[0]
    feeds = extended_inputs(case)
    expected = session(extended_model(feeds, case, function=True)).run(None, feeds)
    binding = (runner := session(extended_model(feeds, case), kernels)).io_binding()
    caches = {n: onnxruntime.OrtValue.ortvalue_from_numpy(feeds.pop(n)) for n in INPUTS[1:3]}
    for name, cache in caches.items():
        binding.bind_ortvalue_input(name, cache)
        binding.bind_ortvalue_output(name.replace("past", "present"), cache)
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output(OUTPUTS[0])
    runner.run_with_iobinding(binding)
    for found, want in zip((binding.get_outputs()[2], *caches.values()), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"write_index": np.array([384, 0])}, "new entries go beyond the cache"),
        ({"past_slots": np.full(300, EXTENDED_SLOTS)}, "a slot is beyond the cache"),
        ({"past_slots": np.arange(299)}, "new tokens, cache, rotary angles and mask do not fit"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    change: dict[str, np.ndarray], message: str, kernels: Path
) -> None:
    feeds = extended_inputs(EXTENDED[0]) | change
    with pytest.raises(Exception, match=f"lvlm.lowered::{NAME}: {message}"):
        session(extended_model(feeds, EXTENDED[0]), kernels).run(None, feeds)


def test_lowered_extend_attends_with_one_node(bundle: Callable[..., Path]) -> None:
    folder = bundle("digits-llava", max_images=2)
    layers = read_bundle(folder).text.layers
    model = onnx.load(folder / "extend.ort-cpu.onnx", load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert (kinds[NAME], kinds["Attention"], kinds["TensorScatter"]) == (layers, 0, 0)
    assert NAME in {function.name for function in model.functions}


def test_what_keeps_chosen_entries_is_left_as_it_is(bundle: Callable[..., Path]) -> None:
    """There entries are written that are not new, in an order of their own."""
    folder = bundle("digits-llava", *CACHED["elastic-cache (cached)"], max_images=2, sessions=True)
    model = onnx.load(folder / "extend.ort-cpu.onnx", load_external_data=False)
    assert NAME not in {node.op_type for node in model.graph.node}
