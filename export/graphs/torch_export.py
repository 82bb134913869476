"""Export of a torch module to a first ONNX graph: torch.export, then torch.onnx."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental import proxy_tensor
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.onnx._internal.exporter._registration import ONNXRegistry

from lvlm.core.errors import ExportError
from lvlm.export.graphs import decompositions, type_promotion
from lvlm.export.graphs.exchanged import exchanged
from lvlm.export.ops.op import OPSET
from lvlm.export.ports import GraphPort


def to_onnx(
    name: str,
    module: nn.Module,
    inputs: Sequence[GraphPort],
    outputs: Sequence[str],
    mode: FakeTensorMode,
) -> ir.Model:
    """The ONNX model of ``module``, which takes its inputs by name; they and sizes are named as
    declared, its outputs ``outputs``."""
    sizes = _example_sizes(inputs)
    dims = {name: torch.export.Dim(name) for name in sizes}
    with mode:
        examples = {
            i.name: torch.zeros([_of(d, sizes) for d in i.dims], dtype=i.dtype) for i in inputs
        }
    dynamic = {
        i.name: {axis: _of(d, dims) for axis, d in enumerate(i.dims) if isinstance(d, str)}
        for i in inputs
    }
    with (
        mode,
        _without_gradients(),
        _quiet(),
        _seldom_collected(),
        # Sizes are symbols here: what torch would find again costs more to keep than it saves
        torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
        # torch.onnx makes its table of ops for every graph anew, which takes it about a second;
        # here it is the same one every time (no graph adds ops to it)
        exchanged(ONNXRegistry, from_torchlib=staticmethod(_registry)),
        # What nobody reads: which line a node is from, how its memory lies, and the Python code of
        # every graph in between
        exchanged(torch.fx.config, do_not_emit_stack_traces=True),
        exchanged(proxy_tensor, _extract_tensor_metadata=_metadata),
        _use_lazy_graph_module(True),
        decompositions.by_need(),
        type_promotion.of_known_values(),
    ):
        exported = torch.export.export(module, (examples,), dynamic_shapes=(dynamic,), strict=False)
        program = torch.onnx.export(
            exported,
            args=(),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            input_names=[i.name for i in inputs],
            output_names=list(outputs),
            verbose=False,
        )
    if program is None:
        raise ExportError(f"torch.onnx gave no graph for {name}")
    _describe_inputs(program.model, inputs)
    return program.model


def _example_sizes(inputs: Sequence[GraphPort]) -> dict[str, int]:
    """A size for every dynamic dimension; all differ, so that no two are taken for the same."""
    given = (d.partition("*") for i in inputs for d in i.dims if isinstance(d, str))
    names = list(dict.fromkeys(after or name for name, _, after in given))
    return {name: 5 + 2 * n for n, name in enumerate(names)}


def _of(dim: int | str, known: Mapping[str, Any]) -> Any:
    """A dimension, or a multiple of one (4*units), by what is known of the names."""
    if isinstance(dim, int):
        return dim
    times, multiple, name = dim.partition("*")
    return int(times) * known[name] if multiple else known[dim]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns about packages it does not need and prints its progress; all of it
    shows where the logger ``lvlm`` is at DEBUG (--verbose)."""
    if logging.getLogger("lvlm").isEnabledFor(logging.DEBUG):
        yield
        return
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _without_gradients() -> Iterator[None]:
    """No gradients; a module's own ``no_grad`` leaves nothing in the program, which torch would
    otherwise split at each and join again."""

    def nothing(*_: object) -> None:
        pass

    with (
        torch.set_grad_enabled(False),
        exchanged(torch.no_grad, __enter__=nothing, __exit__=nothing),
    ):
        yield


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """Tracing makes many objects that live as long as the graph; Python's collector would go
    through all of them again and again."""
    own = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*own)


_registry = functools.cache(ONNXRegistry.from_torchlib)
_metadata = functools.partial(_extract_tensor_metadata, include_contiguity=False)


def _describe_inputs(model: ir.Model, inputs: Sequence[GraphPort]) -> None:
    """Give dynamic dimensions their names everywhere; torch calls them s10, s17 …"""
    if [v.name for v in model.graph.inputs] != [i.name for i in inputs]:
        raise ExportError("torch.onnx changed the inputs of the graph")
    renamed: dict[str, str] = {}
    for value, described in zip(model.graph.inputs, inputs, strict=True):
        for dim, name in zip(value.shape or (), described.dims, strict=True):
            if isinstance(dim, ir.SymbolicDim) and isinstance(name, str):
                renamed[str(dim.value)] = name
    symbols = re.compile(r"\bs\d+\b")
    for value in _values(model.graph):
        if value.shape is None:
            continue
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                text = symbols.sub(lambda m: renamed.get(m[0], m[0]), dim.value)
                # An expression such as 4*batch is no valid dimension name to all readers.
                value.shape[axis] = text if text.isidentifier() else ir.SymbolicDim(None)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs
