"""The form of int8 cache entries: what is stored, and stored again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lvlm.export.ops.parts.int8_entries import RANGE, dequantized, quantized
from lvlm.runtime.bundle.entry_form import entry_width, side_dtype

# From what the smallest step still tells apart to what the largest holds
NUMBERS = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=200, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=NUMBERS))
def test_numbers_are_rounded_to_half_a_step_and_then_stay(entries: np.ndarray) -> None:
    held = quantized(torch.from_numpy(entries))
    assert held.dtype == torch.int8
    assert held.shape[-1] == entry_width(entries.shape[-1], "int8")
    step = 2.0 ** (held[:, -1:].numpy() / 8)
    found = dequantized(held).numpy()
    assert (np.abs(found - entries.astype(float)) <= 0.5001 * step).all()
    # No smaller step would do, but where it is the smallest
    large = np.abs(entries).max(1, keepdims=True).astype(float)
    assert ((large > RANGE * step * 2 ** (-1 / 8) * 0.9999) | (held[:, -1:].numpy() == -128)).all()
    again = quantized(torch.from_numpy(found))
    kept = held[:, -1] > -128  # the smallest step says nothing of how large an entry was
    assert again[kept].equal(held[kept])
    assert dequantized(again).equal(torch.from_numpy(found))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 3e38, 7.03e6])
def test_what_is_not_finite_or_too_large_is_not_finite_in_its_entry_alone(wrong: float) -> None:
    states = torch.ones(3, 8)
    states[1, 2] = wrong
    held = quantized(states)
    assert dequantized(held)[1].isnan().all()
    assert held[[0, 2]].equal(quantized(torch.ones(2, 8)))


def test_zeros_are_zeros() -> None:
    assert dequantized(torch.zeros(2, 9, dtype=torch.int8)).equal(torch.zeros(2, 8))
    assert dequantized(quantized(torch.zeros(2, 8))).equal(torch.zeros(2, 8))


def test_what_lies_beside_is_not_of_8_bits() -> None:
    assert side_dtype("int8") == "float16"
    assert side_dtype("bfloat16") == "bfloat16"
