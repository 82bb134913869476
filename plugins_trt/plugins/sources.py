"""Plans and compiled kernels to what the C++ library is made of: tables.cpp and kernels.bin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lvlm.core.errors import BuildError
from lvlm.plugins_trt.plugins.architectures import ALONE
from lvlm.plugins_trt.plugins.kernel_compiler import Compiled, Image
from lvlm.plugins_trt.plugins.kernels import Kernel, variants
from lvlm.plugins_trt.plugins.plugin_plan import (
    Argument,
    Attribute,
    Output,
    Plugin,
    PluginStep,
    Scalar,
)
from lvlm.plugins_trt.plugins.sizes import Size, as_size

TYPES = {
    "T": "Type::kData",
    "float32": "Type::kFloat32",
    "float16": "Type::kFloat16",
    "bfloat16": "Type::kBFloat16",
    "int64": "Type::kInt64",
    "int32": "Type::kInt32",
    "int8": "Type::kInt8",
}
OPERATIONS = {
    "CONST": "kConst",
    "EXTENT": "kExtent",
    "NUMEL": "kNumel",
    "ADD": "kAdd",
    "SUB": "kSub",
    "MUL": "kMul",
    "FLOOR_DIV": "kFloorDiv",
    "CEIL_DIV": "kCeilDiv",
    "MAX": "kMax",
    "MIN": "kMin",
}
KINDS = {int: "Kind::kInt", float: "Kind::kFloat", str: "Kind::kText"}
IMAGE_ALIGNMENT = 64
INT32 = (-(2**31), 2**31 - 1)


def write_sources(folder: Path, plugins: Sequence[Plugin], compiled: Compiled) -> None:
    """Write tables.cpp and kernels.bin. Raises BuildError for a plan that C++ cannot follow."""
    tables = _Tables()
    text = tables.text(plugins, compiled)
    (folder / "tables.cpp").write_text(text, encoding="utf-8")
    (folder / "kernels.bin").write_bytes(bytes(tables.code))


class _Tables:
    """Named arrays, each before what refers to it; equal ones are written once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[tuple[str, str], str] = {}
        self.code = bytearray()
        self.kernels: dict[Kernel, str] = {}

    def text(self, plugins: Sequence[Plugin], compiled: Compiled) -> str:
        for kernel, images in compiled.items():
            listed = self._list("Image", [self._image(image) for image in images])
            name = f"kernel{len(self.kernels)}"
            self.kernels[kernel] = f"&{name}"
            self.lines.append(f"constexpr Kernel {name}{{{_text(str(kernel))}, {listed}}};")
        last = self._list("PluginTable", [self._plugin(plugin) for plugin in plugins])
        return "\n".join(
            [
                "// Written by lvlm-build.",
                '#include "tables.h"',
                "",
                "namespace lvlm",
                "{",
                "namespace",
                "{",
                "",
                *self.lines,
                "",
                "} // namespace",
                "",
                f"List<PluginTable> const kPlugins{last};",
                "",
                "} // namespace lvlm",
                "",
            ]
        )

    def _list(self, kind: str, items: Sequence[str]) -> str:
        if not items:
            return "{nullptr, 0}"
        body = ", ".join(items)
        key = (kind, body)
        if key not in self.names:
            self.names[key] = f"list{len(self.names)}"
            self.lines.append(f"constexpr {kind} {self.names[key]}[]{{{body}}};")
        return f"{{{self.names[key]}, {len(items)}}}"

    def _image(self, image: Image) -> str:
        self.code.extend(b"\0" * (-len(self.code) % IMAGE_ALIGNMENT))
        offset = len(self.code)
        self.code.extend(image.code)
        alone = not image.ptx and image.arch in ALONE
        return (
            f"{{{image.arch}, {_bool(image.ptx)}, {_bool(alone)}, {offset}, {_text(image.entry)}, "
            f"{image.threads}, {image.shared}, {image.extras}}}"
        )

    def _plugin(self, plugin: Plugin) -> str:
        inputs = {tensor.name: index for index, tensor in enumerate(plugin.inputs)}
        tensors = {name: ("kInput", index) for name, index in inputs.items()}
        tensors |= {o.name: ("kOutput", index) for index, o in enumerate(plugin.outputs)}
        tensors |= {s.name: ("kScratch", index) for index, s in enumerate(plugin.scratch)}
        attributes = {a.name: index for index, a in enumerate(plugin.attributes)}
        words = plugin.words()
        needs = [
            sum(
                1 << index
                for index, tensor in enumerate(plugin.inputs)
                if not tensor.optional or tensor.name in plugin.needs.get(word or "", ())
            )
            for word in words
        ]
        parts = [
            _text(plugin.name),
            self._list(
                "InputTable",
                [
                    f"{{{_text(i.name)}, {TYPES[i.dtype]}, {sum(1 << r for r in i.ranks)}u, "
                    f"{_bool(i.optional)}}}"
                    for i in plugin.inputs
                ],
            ),
            self._list("OutputTable", [self._output(o, inputs) for o in plugin.outputs]),
            self._list(
                "ScratchTable",
                [
                    f"{{{TYPES[s.dtype]}, {self._sizes(_growing(plugin, s.shape), inputs)}, "
                    f"{_bits(plugin, s.when)}u}}"
                    for s in plugin.scratch
                ],
            ),
            self._list("AttributeTable", [self._attribute(plugin, a) for a in plugin.attributes]),
            self._list(
                "StepTable",
                [self._step(plugin, s, tensors, inputs, attributes) for s in plugin.steps],
            ),
            str(attributes[plugin.variant] if plugin.variant else -1),
            self._list("uint32_t", [f"{bits}u" for bits in needs]),
        ]
        return "{" + ", ".join(parts) + "}"

    def _output(self, output: Output, inputs: dict[str, int]) -> str:
        lead = inputs[output.lead] if output.lead else -1
        alias = inputs[output.alias] if output.alias else -1
        shape = self._sizes(output.shape, inputs)
        return f"{{{_text(output.name)}, {TYPES[output.dtype]}, {shape}, {lead}, {alias}}}"

    def _attribute(self, plugin: Plugin, attribute: Attribute) -> str:
        default = attribute.default
        whole = default if isinstance(default, int) else 0
        minimum = INT32[0] if attribute.minimum is None else attribute.minimum
        for number in (whole, minimum):
            if not INT32[0] <= number <= INT32[1]:
                raise BuildError(f"{plugin.name}: {attribute.name}: {number} is no int32")
        real = float(default) if isinstance(default, float) else 0.0
        words = self._list("char const*", [_text(word) for word in attribute.choices])
        return (
            f"{{{_text(attribute.name)}, {KINDS[attribute.kind]}, {_bool(default is None)}, "
            f"{_int32(whole)}, {real!r}f, {_text(default if isinstance(default, str) else '')}, "
            f"{words}, {_int32(minimum)}}}"
        )

    def _step(
        self,
        plugin: Plugin,
        step: PluginStep,
        tensors: dict[str, tuple[str, int]],
        inputs: dict[str, int],
        attributes: dict[str, int],
    ) -> str:
        if not 1 <= len(step.grid) <= 3:
            raise BuildError(f"{plugin.name}: a grid has one to three extents")
        listed = [
            f"{{{TYPES[v.data or 'T']}, {v.block or 0}, {self.kernels[v.kernel]}}}"
            for v in variants(plugin, step)
            if v.kernel in self.kernels
        ]
        arguments = [self._argument(a, tensors, inputs, attributes) for a in step.arguments]
        number = self._size(step.choice[1], inputs) if step.choice else "{nullptr, 0}"
        return (
            f"{{{self._sizes(step.grid, inputs)}, {self._list('ArgumentTable', arguments)}, "
            f"{number}, {self._list('Variant', listed)}, {_bits(plugin, step.when)}u}}"
        )

    def _argument(
        self,
        argument: Argument,
        tensors: dict[str, tuple[str, int]],
        inputs: dict[str, int],
        attributes: dict[str, int],
    ) -> str:
        if isinstance(argument, Size):
            return f"{{Source::kSize, 0, {self._size(argument, inputs)}}}"
        if isinstance(argument, Scalar):
            return f"{{Source::kAttribute, {attributes[argument.attribute]}, {{nullptr, 0}}}}"
        source, index = tensors[argument]
        return f"{{Source::{source}, {index}, {{nullptr, 0}}}}"

    def _sizes(self, sizes: Iterable[Size | int], inputs: dict[str, int]) -> str:
        return self._list("Size", [self._size(as_size(size), inputs) for size in sizes])

    def _size(self, size: Size, inputs: dict[str, int]) -> str:
        tokens = [
            f"{{Operation::{OPERATIONS[t.kind]}, {inputs.get(t.tensor, -1)}, {t.value}}}"
            for t in size
        ]
        return self._list("Token", tokens)


def _bits(plugin: Plugin, when: tuple[str, ...]) -> int:
    """Bit i: for the variant's word i."""
    return sum(1 << i for i, word in enumerate(plugin.words()) if not when or word in when)


def _growing(plugin: Plugin, shape: Sequence[Size]) -> Sequence[Size]:
    """``shape``, if no extent shrinks when an input grows, for extents that a graph fixes, as of
    heads: the workspace is asked for once, for the largest inputs."""
    if any(token.kind == "SUB" for size in shape for token in as_size(size)):
        raise BuildError(
            f"{plugin.name}: a scratch buffer may not shrink while an input grows; do not subtract"
        )
    return shape


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _int32(value: int) -> str:
    return "INT32_MIN" if value == INT32[0] else str(value)


def _text(value: str) -> str:
    """A C++ literal; names and words are plain ASCII."""
    if not value.isascii() or not value.isprintable():
        raise BuildError(f"{value!r} is no name for a table")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
