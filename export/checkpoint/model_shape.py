"""A model of any size by its shape alone, and with parameters of one's own in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lvlm.export.families.family import Family
from lvlm.export.graphs.skeleton import Skeleton
from lvlm.export.leaves import Leaves, leaves_of


def skeleton_of(family: Family, config: Any, shape: nn.Module, dtype: torch.dtype) -> Skeleton:
    """``shape``, the family's model of ``dtype`` on the meta device, with fake parameters and what
    the family finds in it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = _traceable(shape, leaves_of(family), mode)
    parts = family.language(model, config), family.vision(model, config)
    return Skeleton(model, *parts, dtype, mode)


def build_shape(family: Family, config: Any, dtype: torch.dtype) -> nn.Module:
    """The family's model on the meta device: names and shapes, at no cost. CheckpointError names a
    leaf module that the family does not know."""
    with default_dtype(dtype), torch.device("meta"):
        model = family.build(config)
    leaves_of(family).check(model)
    return model


def _traceable(model: nn.Module, leaves: Leaves, mode: FakeTensorMode) -> nn.Module:
    """``model`` of the meta device with fake parameters and real buffers, in place."""

    def fake(_: str, old: torch.Tensor) -> torch.Tensor:
        with mode:  # meta parameters cannot be traced as CPU tensors; fake ones can
            return torch.empty(old.shape, dtype=old.dtype, device="cpu")

    return with_parameters(model, leaves, fake)


def with_parameters(
    model: nn.Module, leaves: Leaves, parameter: Callable[[str, torch.Tensor], torch.Tensor]
) -> nn.Module:
    """``model`` of the meta device with what ``parameter`` gives for each name and meta parameter,
    and real buffers, in place. Tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                data = parameter(f"{path}.{name}" if path else name, old)
                made[id(old)] = nn.Parameter(data, requires_grad=False)
            module._parameters[name] = made[id(old)]
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers[name] is not None:
                module._buffers[name] = leaves.buffer(module, name)
    return model.eval().requires_grad_(False)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
