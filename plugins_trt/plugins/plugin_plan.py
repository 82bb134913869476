"""The plan of a plugin, as data: which kernels run, in which order, on what, over which grid.

The same plan is run by Python (plan_runner.py: the tests, in Triton's interpreter or on a GPU) and,
as tables compiled into the plugin library, by one C++ plugin class that serves every op. A new op
is a folder with a ``kernel.py`` (Triton) and a ``plugin.py`` whose ``PLUGIN`` is a ``Plugin``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lvlm.core.discovery import nearest
from lvlm.core.errors import ParameterError
from lvlm.plugins_trt.plugins.sizes import Shapes, Size

# Types of data: the op's own ("T", one of FLOATS for a whole call) or a fixed one
DATA = "T"
FLOATS = ("float32", "float16", "bfloat16")

# Head sizes that kernels come in: a head takes the next of these, the rest is masked.
HEAD_BLOCKS = (32, 64, 128)


@dataclass(frozen=True)
class PluginInput:
    """``dtype`` is DATA or a fixed one; ``ranks`` those allowed; optional inputs come last."""

    name: str
    dtype: str
    ranks: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class Output:
    """shape  the extents; with ``lead``, of the last axis only, after the others of that input
    alias  the input whose memory the output is: the plugin works in place"""

    name: str
    dtype: str
    shape: tuple[Size, ...]
    lead: str | None = None
    alias: str | None = None


@dataclass(frozen=True)
class Scratch:
    """Memory that lasts for one call; holds anything at its beginning.

    when  the words of the plugin's variant attribute that need it; (): all
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    when: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attribute:
    """A node attribute, whose type is that of ``default`` or, without one, of ``kind``.

    choices  the words that a string may be
    unused   accepted and without effect on what is computed
    minimum  the smallest integer allowed
    """

    name: str
    kind: type[int] | type[float] | type[str]
    default: int | float | str | None = None
    choices: tuple[str, ...] = ()
    unused: bool = False
    minimum: int | None = None


@dataclass(frozen=True)
class Scalar:
    """An attribute's value as a kernel argument: int32, or fp32."""

    attribute: str


Argument = str | Size | Scalar  # a tensor by name, a number (int32), an attribute


@dataclass(frozen=True)
class PluginStep:
    """One kernel launch.

    kernel     a Triton function; its tl.constexpr parameters are ``constants``, ``choice``'s and
               nothing else
    grid       up to three extents; a launch of nothing is left out
    arguments  of the other parameters, in order
    choice     (name of a constexpr, number, blocks): the first of the blocks that the number fits
    when       the words of the plugin's variant attribute for which the step runs; (): for all
    """

    kernel: Any
    grid: tuple[Size, ...]
    arguments: tuple[Argument, ...]
    constants: Mapping[str, int | bool] = field(default_factory=dict)
    choice: tuple[str, Size, tuple[int, ...]] | None = None
    when: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Plugin:
    """The plugin of the op ``name``.

    variant  the string attribute that decides which steps run, if any
    needs    for a word of the variant: optional inputs that it takes; all others it must not have
    """

    name: str
    inputs: tuple[PluginInput, ...]
    outputs: tuple[Output, ...]
    steps: tuple[PluginStep, ...]
    attributes: tuple[Attribute, ...] = ()
    scratch: tuple[Scratch, ...] = ()
    variant: str | None = None
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def steps_for(self, word: str | None) -> list[PluginStep]:
        """The steps of one variant."""
        return [step for step in self.steps if not step.when or word in step.when]

    def scratch_for(self, word: str | None) -> list[Scratch]:
        """The scratch buffers of one variant."""
        return [each for each in self.scratch if not each.when or word in each.when]

    def words(self) -> tuple[str | None, ...]:
        """Every variant; (None,) without any."""
        for attribute in self.attributes:
            if attribute.name == self.variant:
                return attribute.choices
        return (None,)

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every attribute's value. Raises ParameterError for one that is unknown, missing, of
        another type, or out of its range."""
        known = {attribute.name: attribute for attribute in self.attributes}
        for name in given:
            if name not in known:
                raise nearest(f"attribute of {self.name}", name, known)
        values = {}
        for name, attribute in known.items():
            value = given.get(name, attribute.default)
            if value is None:
                raise ParameterError(f"{self.name} needs the attribute {name}")
            if attribute.kind is float and isinstance(value, int):
                value = float(value)
            if not isinstance(value, attribute.kind):
                raise ParameterError(f"{self.name}: {name} is {value!r}")
            if attribute.choices and value not in attribute.choices:
                raise nearest(f"{name} of the plugin {self.name}", str(value), attribute.choices)
            if (
                attribute.minimum is not None
                and isinstance(value, int)
                and value < attribute.minimum
            ):
                raise ParameterError(
                    f"{self.name}: {name} is {value}; at least {attribute.minimum} is needed"
                )
            values[name] = value
        return values

    def output_shapes(self, shapes: Shapes) -> list[tuple[int, ...]]:
        """The extents of every output."""
        return [
            (*(shapes[o.lead][:-1] if o.lead else ()), *(size(shapes) for size in o.shape))
            for o in self.outputs
        ]


def chosen(step: PluginStep, shapes: Shapes) -> dict[str, int | bool]:
    """The constexpr values of a step. Raises ParameterError if no block is large enough."""
    values = dict(step.constants)
    if step.choice is not None:
        name, number, blocks = step.choice
        needed = number(shapes)
        fitting = [block for block in blocks if block >= needed]
        if not fitting:
            raise ParameterError(f"no kernel for a size of {needed}; the largest is {blocks[-1]}")
        values[name] = fitting[0]
    return values
