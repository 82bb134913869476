"""Kernels that a plan may launch: a Triton function with types and constants, once each.

A step comes in one variant per data type (where that is a type of one of its tensors) and per block
of its choice. Steps, also of different plugins, that come out the same share one kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lvlm.core.errors import BuildError
from lvlm.plugins_trt.plugins.plugin_plan import DATA, FLOATS, Plugin, PluginStep, Scalar
from lvlm.plugins_trt.plugins.sizes import Size

POINTERS = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "int64": "*i64",
    "int32": "*i32",
    "int8": "*i8",
}
CONSTEXPR = "constexpr"


@dataclass(frozen=True)
class Kernel:
    """One kernel to compile. The function is named, not held: another process imports it.

    signature  (parameter, Triton's word for its type) in order, CONSTEXPR for the constants
    """

    module: str
    function: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | bool], ...]
    warps: int
    stages: int

    def __str__(self) -> str:
        types = [kind for _, kind in self.signature if kind.startswith("*")]
        data = next((t[1:] for t in types if t in ("*fp16", "*bf16")), "")
        chosen = " ".join(f"{name}={value}" for name, value in self.constants)
        folder = self.module.removesuffix(".kernel").rpartition(".")[2]
        return " ".join(part for part in (f"{folder}.{self.function}", data, chosen) if part)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The types of what is given at a launch."""
        return tuple(kind for _, kind in self.signature if kind != CONSTEXPR)


@dataclass(frozen=True)
class KernelVariant:
    """data   the data type that this is for, None: any
    block  the block of the step's choice that this is for, None: there is no choice"""

    data: str | None
    block: int | None
    kernel: Kernel


def variants(
    plugin: Plugin, step: PluginStep, floats: Sequence[str] = FLOATS
) -> Iterator[KernelVariant]:
    """Kernels that a step may launch; ``floats`` are the data types wanted. Raises BuildError for a
    plan that does not fit its function."""
    tensors = _tensor_types(plugin)
    used = {tensors.get(argument, "") for argument in step.arguments if isinstance(argument, str)}
    for data in floats if DATA in used else (None,):
        for block in step.choice[2] if step.choice else (None,):
            yield KernelVariant(data, block, _kernel(plugin, step, tensors, data, block))


def all_kernels(plugins: Sequence[Plugin], floats: Sequence[str] = FLOATS) -> list[Kernel]:
    """Every kernel of these plugins, each once."""
    found = {
        variant.kernel: None
        for plugin in plugins
        for step in plugin.steps
        for variant in variants(plugin, step, floats)
    }
    return list(found)


def _tensor_types(plugin: Plugin) -> dict[str, str]:
    types = {tensor.name: tensor.dtype for tensor in plugin.inputs}
    types |= {tensor.name: tensor.dtype for tensor in plugin.outputs}
    return types | {tensor.name: tensor.dtype for tensor in plugin.scratch}


def _kernel(
    plugin: Plugin, step: PluginStep, tensors: dict[str, str], data: str | None, block: int | None
) -> Kernel:
    function = getattr(step.kernel, "fn", step.kernel)
    where = f"{plugin.name}: {function.__name__}"
    constants = dict(step.constants)
    if step.choice and block is not None:
        constants[step.choice[0]] = block
    kinds = {attribute.name: attribute.kind for attribute in plugin.attributes}
    given = []
    for argument in step.arguments:
        if isinstance(argument, Size):
            given.append("i32")
        elif isinstance(argument, Scalar):
            kind = kinds.get(argument.attribute)
            if kind not in (int, float):
                raise BuildError(f"{where} takes {argument.attribute}, which is no number")
            given.append("fp32" if kind is float else "i32")
        elif argument not in tensors:
            raise BuildError(f"{where} takes {argument}, which is no tensor of the plan")
        else:
            dtype = tensors[argument]
            given.append(POINTERS[data if dtype == DATA and data else dtype])
    names = list(inspect.signature(function).parameters)
    missing = [name for name in constants if name not in names]
    if missing or len(names) - len(constants) != len(given):
        raise BuildError(
            f"{where} has the parameters {', '.join(names)}; the plan gives {len(given)} and the "
            f"constants {', '.join(constants) or 'none'}"
        )
    rest = iter(given)
    signature = tuple((name, CONSTEXPR if name in constants else next(rest)) for name in names)
    return Kernel(
        module=function.__module__,
        function=function.__name__,
        signature=signature,
        constants=tuple(sorted(constants.items())),
        warps=step.warps,
        stages=step.stages,
    )
