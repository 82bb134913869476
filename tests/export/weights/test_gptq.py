"""Rounding on samples, against the method written anew with loops and plain inverses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lvlm.core.errors import ExportError
from lvlm.export.checkpoint.quantized.parts.packed_tensor import Unpacked
from lvlm.export.weights.gptq_rounding import DAMPING, SHRINKS, Moments
from lvlm.export.weights.quantization import WeightQuantization, dequantize, quantize

HOW = WeightQuantization(4, 16)


def drawn(seed: int, rows: int = 96, inputs: int = 48, outputs: int = 5) -> list[np.ndarray]:
    """Inputs [R,K] that depend on one another, of different sizes, and a weight [N,K]."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, 12)) @ rng.standard_normal((12, inputs))
    given = (mixed + 0.1 * rng.standard_normal((rows, inputs))) * rng.uniform(0.1, 3, inputs)
    return [given.astype(np.float32), rng.standard_normal((outputs, inputs), np.float32)]


def rounded(given: np.ndarray, weight: np.ndarray, how: WeightQuantization = HOW) -> Unpacked:
    moments = Moments(weight.shape[1])
    for rows in np.array_split(given, 3):
        moments.add(torch.from_numpy(rows)[None])
    return moments.weighing().gptq(torch.from_numpy(weight), how, torch.float32)


def naive(given: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [N,K] and scales [N,K/16] in fp64: after each column the inverse of what is left."""
    inputs = weight.shape[1]
    second = given.astype(float).T @ given.astype(float)
    second += np.eye(inputs) * DAMPING * np.trace(second) / inputs
    numbers, scales = np.zeros(weight.shape, int), np.zeros((len(weight), inputs // 16))
    for row, values in enumerate(weight.astype(float)):
        left = values.copy()
        for column in range(inputs):
            if column % 16 == 0:
                block = left[column : column + 16]
                widest = max(block, key=abs) / -8
                errors = []
                for shrink in SHRINKS:
                    scale, error = widest * shrink, 0.0
                    for at, value in enumerate(block):
                        near = min(7, max(-8, round(value / scale))) * scale
                        error += second[column + at, column + at] * (value - near) ** 2
                    errors.append(error)
                scale = widest * SHRINKS[int(np.argmin(errors))]
                scales[row, column // 16] = scale
            number = min(7, max(-8, round(left[column] / scale)))
            numbers[row, column] = number + 8
            inverse = np.linalg.inv(second[column:, column:])
            off = (left[column] - number * scale) / inverse[0, 0]
            left[column + 1 :] -= off * inverse[0, 1:]
    return numbers, scales


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_method_written_anew(seed: int) -> None:
    given, weight = drawn(seed)
    found, (numbers, scales) = rounded(given, weight), naive(given, weight)
    assert found.numbers.dtype == torch.uint8
    np.testing.assert_array_equal(found.numbers.numpy(), numbers)
    np.testing.assert_allclose(found.scales.numpy(), scales, rtol=1e-3)
    assert found.zero_points is None


@pytest.mark.parametrize("seed", range(3))
def test_outputs_are_nearer_than_those_of_the_nearest_numbers(seed: int) -> None:
    given, weight = drawn(seed, outputs=32)
    packed, scales = quantize(weight.T, HOW)
    nearest = dequantize(packed, scales, HOW).T
    ours = rounded(given, weight).dense(4).numpy()
    wanted = given @ weight.T
    errors = [float(np.square(given @ w.T - wanted).sum()) for w in (ours, nearest)]
    assert errors[0] < 0.5 * errors[1]
    assert np.abs(ours - weight).mean() > np.abs(nearest - weight).mean()


def test_scales_are_those_that_the_bundle_has() -> None:
    """What is rounded after a scale was knows of it."""
    given, weight = drawn(0)
    moments = Moments(48)
    moments.add(torch.from_numpy(given))
    found = moments.weighing().gptq(torch.from_numpy(weight), HOW, torch.float16)
    assert found.scales.dtype == torch.float32
    assert torch.equal(found.scales, found.scales.half().float())


def test_inputs_and_weights_of_nothing_but_zeros() -> None:
    given, weight = drawn(0)
    weight[1] = weight[2, 16:32] = 0
    packed, scales = quantize(weight.T, HOW)
    found = rounded(np.zeros_like(given), weight).dense(4).numpy()  # of a layer that got nothing
    nearest = dequantize(packed, scales, HOW).T
    errors = [float(np.square(w - weight).sum()) for w in (found, nearest)]
    assert errors[0] < errors[1]
    assert not found[weight == 0].any()
    given[:, :20] = 0
    some = rounded(given, weight)
    assert some.scales.isfinite().all()
    assert not some.dense(4)[1].any()


def test_numbers_that_are_not_finite_are_one_line() -> None:
    given, weight = drawn(0)
    given[3, 4] = np.inf
    with pytest.raises(ExportError, match="not finite from the calibration samples"):
        rounded(given, weight)
