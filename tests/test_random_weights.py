"""The checkpoints that bundles are compared by have nothing that could be left out unseen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import TINY
from safetensors.torch import load_file


@pytest.mark.parametrize("name", TINY)
def test_no_parameter_of_a_random_checkpoint_is_constant(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    """Neither a bias of 0 nor a norm of 1; no two biases or norms alike, which could be swapped."""
    tensors = load_file(checkpoint(name) / "model.safetensors")
    assert len(tensors) > 20
    assert [key for key, tensor in tensors.items() if tensor.float().std() < 0.01] == []
    vectors = {tuple(t.flatten().tolist()) for t in tensors.values() if t.dim() == 1}
    assert len(vectors) == sum(t.dim() == 1 for t in tensors.values())
