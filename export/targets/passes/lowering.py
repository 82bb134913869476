"""Lowering of a canonical graph to one that a target's parser takes: the passes and their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir

from lvlm.core.errors import ExportError
from lvlm.core.output import whole_file
from lvlm.export.targets.description import Description
from lvlm.export.targets.passes import decomposed, graph_edits
from lvlm.export.targets.passes.fp16_matmuls import fp16_matmuls
from lvlm.export.targets.passes.own_weights import OwnWeights
from lvlm.export.targets.passes.plugin_attention import use_cache_attention
from lvlm.export.targets.passes.signed_weights import check_quantized_weights, use_signed_weights
from lvlm.export.targets.passes.split_linears import split_linears
from lvlm.runtime.bundle.manifest import Capacity


def check(model: ir.Model, target: Description) -> None:
    """Raise ExportError for what ``target`` does not take of a canonical graph."""
    if not target.low_precision:
        graph_edits.refuse_low_precision(model, target.name, weights=target.signed is None)
    if target.signed is not None:
        check_quantized_weights(model, target)


def lower(model: ir.Model, target: Description, capacity: Capacity) -> None:
    """Change ``model`` into its form for ``target``.

    With plugins every lvlm op is left without a function, and nothing else is a function, either:
    parsers before TensorRT 10.6 confuse the names inside functions with those around them.
    """
    check(model, target)
    if target.static_cache:
        lengths = {f"capacity_{i}": c for i, c in enumerate(capacity.per_layer)}
        graph_edits.fix_dimensions(model, lengths)
    if target.flavour in ("tensorrt", "tensorrt-rtx"):
        split_linears(model)
    if target.flavour != "onnxruntime":
        graph_edits.lower_ops(model, target.plugins)
    if target.signed is not None:
        use_signed_weights(model, target)
    if target.plugins:
        use_cache_attention(model, target.attention, cache=target.valid_only)
    graph_edits.decompose_attention(model, target.attention, target.row_heads)
    if "float32" not in target.matmul_types:
        fp16_matmuls(model)
    if "RMSNormalization" not in target.imports:
        decomposed.decompose_normalization(model)
    if "RotaryEmbedding" not in target.imports:
        decomposed.decompose_rotary(model)
    if "TensorScatter" not in target.imports:
        write_cache = (
            decomposed.cache_updates if target.plugins else decomposed.decompose_cache_updates
        )
        write_cache(model)
    if target.plugins:
        graph_edits.inline_lowered(model)
        graph_edits.use_plugins(model)
    graph_edits.lower_opset(model, target.opset)


def write(
    bundle: Path, files: Mapping[str, str], weights: str, lower: Callable[[ir.Model], None]
) -> list[str]:
    """Lower each graph of ``files`` (canonical file -> its file for the target) beside it; the new
    files' names. Weights that ``lower`` computes go into the file ``weights``, where there are any.
    A file is there whole or not at all."""
    with OwnWeights(bundle / weights) as own:
        for file, name in files.items():
            model = ir.load(bundle / file)
            lower(model)
            for value in model.graph.initializers.values():
                own.take(value)
                _keep_external(value)
            with whole_file(bundle / name, ExportError) as partial:
                ir.save(model, partial)
    return [*files.values(), *([weights] if own.places else [])]


def _keep_external(value: ir.Value) -> None:
    """Loading tied the tensor to the folder of now; in the file it lies beside the graph."""
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor):
        value.const_value = ir.ExternalTensor(
            Path(tensor.location).name,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=str(tensor.name),
        )
