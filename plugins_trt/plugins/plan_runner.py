"""Run a plan from Python, kernel by kernel, on torch tensors: in Triton's interpreter
(``TRITON_INTERPRET=1``) on the CPU, compiled on a GPU. For tests and measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import triton

from lvlm.core.errors import ParameterError
from lvlm.plugins_trt.plugins.plugin_plan import DATA, Plugin, Scalar, chosen
from lvlm.plugins_trt.plugins.sizes import Size


def run(
    plugin: Plugin,
    inputs: Sequence[torch.Tensor | None],
    attributes: Mapping[str, Any],
    *,
    checked: bool = True,
) -> tuple[torch.Tensor, ...]:
    """The outputs of one call, as the op's torch reference gives them.

    inputs   in the plugin's order; None or left out: an optional input that is not there
    checked  a buffer begins with something absurd in it, so that what a kernel does not write is
             seen, and an input whose memory an output takes is copied first; False, for
             measurements: memory as it comes, and in place
    Raises ParameterError for attributes or inputs that do not fit.
    """
    values = plugin.values(attributes)
    word = values[plugin.variant] if plugin.variant else None
    tensors: dict[str, torch.Tensor] = {}
    wanted = plugin.needs.get(word or "", ())
    for spec, tensor in zip(plugin.inputs, [*inputs, *[None] * len(plugin.inputs)], strict=False):
        if (tensor is not None) != (not spec.optional or spec.name in wanted):
            raise ParameterError(f"{plugin.name}: {spec.name} is missing, or not for {word}")
        if tensor is not None:
            tensors[spec.name] = tensor.contiguous()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    data = next(tensors[spec.name] for spec in plugin.inputs if spec.dtype == DATA)

    def buffer(dtype: str, shape: Sequence[int]) -> torch.Tensor:
        kind = data.dtype if dtype == DATA else getattr(torch, dtype)
        if not checked:
            return torch.empty(shape, dtype=kind, device=data.device)
        return torch.full(shape, float("nan") if kind.is_floating_point else 77, dtype=kind,
                          device=data.device)  # fmt: skip

    for scratch in plugin.scratch_for(word):
        tensors[scratch.name] = buffer(scratch.dtype, [size(shapes) for size in scratch.shape])
    outputs = []
    for output, shape in zip(plugin.outputs, plugin.output_shapes(shapes), strict=True):
        if output.alias is None:
            tensor = buffer(output.dtype, shape)
        else:
            tensor = tensors[output.alias]
            tensor = tensor.clone() if checked else tensor
        tensors[output.name] = tensor
        outputs.append(tensor)

    for step in plugin.steps_for(word):
        grid = tuple(size(shapes) for size in step.grid)
        if 0 in grid:
            continue
        arguments = []
        for argument in step.arguments:
            if isinstance(argument, Scalar):
                arguments.append(values[argument.attribute])
            elif isinstance(argument, Size):
                arguments.append(argument(shapes))
            else:
                arguments.append(tensors[argument])
        numbers = tuple(not isinstance(argument, str) for argument in step.arguments)
        _unspecialized(step.kernel, numbers)[grid](
            *arguments, **chosen(step, shapes), num_warps=step.warps, num_stages=step.stages
        )
    return tuple(outputs)


@cache
def _unspecialized(kernel: Any, numbers: tuple[bool, ...]) -> Any:
    """The kernel as the plugin library has it: one code for all values of its numbers.

    numbers  which of its arguments are numbers
    """
    if not isinstance(kernel, triton.JITFunction):
        return kernel  # interpreted
    arguments = [p.name for p in kernel.params if not p.is_constexpr]
    names = [name for name, number in zip(arguments, numbers, strict=True) if number]
    return triton.jit(kernel.fn, do_not_specialize=names)
