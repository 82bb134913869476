"""MatMuls whose weights come quantized and keep their integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lvlm.core.errors import ExportError
from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.expressions import Expression
from lvlm.export.weights.packed_weights import PackedWeight, parts_of
from lvlm.export.weights.quantized_weights import QuantizedWeight
from lvlm.export.weights.steps.matmul_weights import exchange_weights
from lvlm.export.weights.store import WeightStore


@dataclass(frozen=True)
class KeepPacked:
    """Multiply with the checkpoint's ``packed`` tensors as they are, by name.

    ``apply`` raises ExportError if one of them is not multiplied with as expected.
    """

    packed: Mapping[str, PackedTensor]

    def apply(self, graphs: Sequence[TracedGraph], store: WeightStore) -> None:
        kept = exchange_weights(graphs, store, self._packed)
        if left := sorted(set(self.packed) - kept):
            raise ExportError(f"{left[0]} is no plain MatMul; give --dequantize")

    def _packed(self, _: str, weight: Expression) -> QuantizedWeight | None:
        parts = parts_of(weight, self.packed)
        return None if parts is None else PackedWeight(weight, parts)
