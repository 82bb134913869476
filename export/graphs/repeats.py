"""Blocks that differ in their weights alone are traced once; each then gets a copy of the nodes.

torch's exporter takes seconds for a block, a copy milliseconds. A module calls ``repeated`` for
each of its blocks; while a graph is traced, that leaves one node in place of the block, and
``write_out`` puts the nodes of the kind's one trace there, with the block's own weights.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lvlm.core.errors import ExportError
from lvlm.export.ports import GraphPort

DOMAIN = "lvlm.repeats"  # of the nodes that stand for blocks while a graph is traced
Body = Callable[..., dict[str, torch.Tensor]]
Described = tuple[torch.dtype, Sequence[Any]]  # dtype and shape, whose sizes may be symbolic
NUMBERS = ("layer_idx",)  # attributes that say which block a module is in, and nothing else


@dataclass(frozen=True)
class Kind:
    """A kind of blocks, traced once: ``body`` with ``module``, the first of its blocks."""

    body: Body
    module: nn.Module
    inputs: Sequence[GraphPort]
    outputs: tuple[str, ...]


@dataclass
class Repeats:
    """The blocks of one graph: their kinds, and every module by the number its nodes have."""

    kinds: list[Kind] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)

    def node(
        self, kind: Kind, inputs: Sequence[torch.Tensor], outputs: Mapping[str, Described]
    ) -> dict[str, torch.Tensor]:
        found = next((i for i, known in enumerate(self.kinds) if _same(known, kind)), None)
        if found is None:
            found = len(self.kinds)
            self.kinds.append(kind)
        member = next((i for i, m in enumerate(self.modules) if m is kind.module), None)
        if member is None:
            member = len(self.modules)
            self.modules.append(kind.module)
        values = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::Block",
            inputs,
            {"kind": found, "module": member},
            dtypes=[dtype for dtype, _ in outputs.values()],
            shapes=_by_few_symbols(inputs, [shape for _, shape in outputs.values()]),
            version=1,
        )
        return dict(zip(outputs, values, strict=True))


_tracing: ContextVar[Repeats | None] = ContextVar("tracing", default=None)


@contextmanager
def collected() -> Iterator[Repeats]:
    """Within: calls of ``repeated`` leave nodes, and what these stand for is collected."""
    repeats = Repeats()
    token = _tracing.set(repeats)
    try:
        yield repeats
    finally:
        _tracing.reset(token)


def repeated(
    body: Body,
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[str, Described],
) -> dict[str, torch.Tensor]:
    """``body(module, **inputs)``, which gives ``outputs``; one node of a graph that is traced.

    Args:
        body: a function or bound method that depends on nothing but its arguments and what is the
            same for all blocks of the graph
        module: the block, with all parameters that the body reads
    """
    repeats = _tracing.get()
    if repeats is None:
        return body(module, **inputs)
    kind = Kind(body, module, _patterns(inputs), tuple(outputs))
    return repeats.node(kind, list(inputs.values()), outputs)


def like(x: torch.Tensor) -> Described:
    return x.dtype, x.shape


def run_layer(layer: nn.Module, hidden: torch.Tensor, *, masked: bool) -> torch.Tensor:
    """A layer of a vision tower, [units,patches,D] -> the same; ``masked``: it takes an attention
    mask, of which there is none."""
    body = _without_mask if masked else _layer
    return repeated(body, layer, {"hidden": hidden}, {"hidden": like(hidden)})["hidden"]


def _layer(layer: nn.Module, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"hidden": layer(hidden)}


def _without_mask(layer: nn.Module, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"hidden": layer(hidden, None)}


class BodyModule(nn.Module):
    """A kind as a module of its own, its outputs in the order they were described in."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.body, self.module, self.outputs = kind.body, kind.module, kind.outputs

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = self.body(self.module, **inputs)
        if found.keys() != set(self.outputs):
            told, given = (", ".join(sorted(names)) for names in (self.outputs, found))
            raise ExportError(f"a block gives {given}, not the {told} expected")
        return {name: found[name] for name in self.outputs}


def _patterns(inputs: Mapping[str, torch.Tensor]) -> list[GraphPort]:
    """The inputs' types and sizes; every symbolic size gets a name by where it comes first, its
    multiples are told by that (4*size_0)."""
    names: dict[object, str] = {}

    def name(size: int | torch.SymInt) -> int | str:
        if isinstance(size, int):
            return size
        times, symbol = size.node.expr.as_coeff_Mul()
        if times == 1 or not symbol.is_symbol:
            return names.setdefault(_identity(size), f"size_{len(names)}")
        one = names.setdefault(size.node.hint // int(times), f"size_{len(names)}")
        return f"{int(times)}*{one}"

    return [GraphPort(n, x.dtype, tuple(map(name, x.shape))) for n, x in inputs.items()]


def _identity(size: torch.SymInt) -> object:
    """The identity of a size. Each input has symbols of its own, even for sizes that are
    declared to be the same; their example values then are (torch_export.py), and no others."""
    expression = size.node.expr
    return size.node.hint if expression.is_symbol else (size.node.hint, str(expression))


def _by_few_symbols(
    inputs: Sequence[torch.Tensor], shapes: Sequence[Sequence[Any]]
) -> list[list[Any]]:
    """The shapes with each size's first symbol among ``inputs``: every further one would be a node
    that the exporter carries through all its passes."""
    first: dict[object, Any] = {}
    for x in inputs:
        for size in x.shape:
            if not isinstance(size, int):
                first.setdefault(_identity(size), size)
    return [
        [s if isinstance(s, int) else first.get(_identity(s), s) for s in shape] for shape in shapes
    ]


def _same(a: Kind, b: Kind) -> bool:
    ports = a.inputs == b.inputs and a.outputs == b.outputs
    return a.body == b.body and ports and _alike(a.module, b.module)


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """True where two modules compute the same from the same weights: classes, sizes, settings."""
    if a is b:
        return True
    if type(a) is not type(b) or a._modules.keys() != b._modules.keys():
        return False
    own = {"_parameters", "_buffers", "_modules", *NUMBERS}
    settings = [{k: v for k, v in m.__dict__.items() if k not in own} for m in (a, b)]
    return (
        _equal(settings[0], settings[1])
        and all(_alike_tensors(getattr(a, n), getattr(b, n)) for n in ("_parameters", "_buffers"))
        and all(
            x is y or (x is not None and y is not None and _alike(x, y))
            for x, y in zip(a._modules.values(), b._modules.values(), strict=True)
        )
    )


def _alike_tensors(
    a: Mapping[str, torch.Tensor | None], b: Mapping[str, torch.Tensor | None]
) -> bool:
    """Parameters of the same sizes; buffers, whose values are part of the trace, the same ones."""

    def alike(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
        if x is None or y is None or not isinstance(x, nn.Parameter):
            return x is y
        return isinstance(y, nn.Parameter) and (x.shape, x.dtype) == (y.shape, y.dtype)

    return a.keys() == b.keys() and all(alike(a[n], b[n]) for n in a)


def _equal(a: Any, b: Any) -> bool:
    """Equality of settings; what cannot be compared is not equal."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, types.MethodType):  # of exchanged leaves: bound to each its own module
        return a.__func__ is b.__func__
    if isinstance(a, partial):  # of activations
        return a.func is b.func and _equal(a.args, b.args) and _equal(a.keywords, b.keywords)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return isinstance(a, int | float | str | tuple | list | set | torch.dtype) and bool(a == b)
