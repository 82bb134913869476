"""List of what is done to the weights between tracing and writing, in order. A step is a file in
steps/ and a line here; nothing else knows of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.quantization import WeightQuantization
from lvlm.export.weights.steps.fold_transposes import FoldTransposes
from lvlm.export.weights.steps.fuse_linears import FuseLinears
from lvlm.export.weights.steps.keep_packed import KeepPacked
from lvlm.export.weights.steps.quantize_linears import QuantizeLinears
from lvlm.export.weights.steps.share_across_graphs import ShareAcrossGraphs
from lvlm.export.weights.steps.share_fills import ShareFills
from lvlm.export.weights.store import WeightStore


class WeightStep(Protocol):
    """One transformation of weights, and of the nodes that read them."""

    def apply(self, graphs: Sequence[TracedGraph], store: WeightStore) -> None:
        """Change all ``graphs`` and ``store`` alike, in place. The weights have no values yet."""


def weight_steps(
    how: WeightQuantization | None,
    linears: Collection[str],
    packed: Mapping[str, PackedTensor] | None = None,
    calibrated: Mapping[str, PackedTensor] | None = None,
) -> tuple[WeightStep, ...]:
    """The steps of an export.

    Args:
        how: to quantize, if at all.
        linears: the checkpoint's tensors that are quantized then.
        packed: those that come quantized and stay so.
        calibrated: all ``linears``, where they are quantized already.
    """
    quantize = () if how is None else (QuantizeLinears(how, frozenset(linears), calibrated or {}),)
    keep = (KeepPacked(packed),) if packed else ()
    fuse = FuseLinears({name: tensor.bits for name, tensor in (packed or {}).items()})
    return (FoldTransposes(), fuse, *quantize, *keep, ShareAcrossGraphs(), ShareFills())
