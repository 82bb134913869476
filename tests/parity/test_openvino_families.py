"""OpenVINO's logits beside ONNX Runtime's, for every family."""

from __future__ import annotations

import numpy as np
import pytest
from bundles import OTHERS
from openvino_tools import SMALL, Make, decode_steps, lowering

import lvlm


@pytest.fixture(scope="module")
def lowered(bundle: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """lowered("none"): a bundle with graphs for OpenVINO."""
    return lowering(bundle, tmp_path_factory)


@pytest.mark.parametrize(
    ("model", "dtype", "tolerance"),
    [
        (SMALL, "fp32", 2e-4),
        ("digits-llava", "fp16", 0.05),
        *((name, "fp32", 1e-3) for name in OTHERS),
    ],
)
def test_logits_are_those_of_the_cpu(
    model: str, dtype: str, tolerance: float, lowered: Make
) -> None:
    """Other heads and biases, other families' images; fp16 bundles, computed in fp32 here."""
    folder = lowered("none", model, dtype)
    with lvlm.load(folder, threads=1) as cpu:
        expected = decode_steps(cpu, 3)
    with lvlm.load(folder, device="openvino", threads=1) as ours:
        for mine, other in zip(decode_steps(ours, 3), expected, strict=True):
            np.testing.assert_allclose(mine, other, atol=tolerance)
