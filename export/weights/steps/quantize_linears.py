"""MatMuls with quantized weights: DequantizeLinear, Transpose and MatMul in a MatMul's place, or
DequantizeLinear and Gemm in a Gemm's.

Standard ops on purpose: every reader of ONNX runs them. Targets exchange them for a MatMul of
their own that reads the quantized weight directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lvlm.core.errors import ExportError
from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor
from lvlm.export.graphs.tracing import TracedGraph
from lvlm.export.weights.expressions import Expression, sources
from lvlm.export.weights.packed_weights import PackedWeight, parts_of
from lvlm.export.weights.quantization import WeightQuantization
from lvlm.export.weights.quantized_weights import QuantizedWeight, RoundedWeight
from lvlm.export.weights.steps.matmul_weights import exchange_weights
from lvlm.export.weights.store import WeightStore


@dataclass(frozen=True)
class QuantizeLinears:
    """Quantize the MatMuls with the checkpoint's tensors ``wanted``, several of which may lie side
    by side in one weight.

    how         numbers are rounded to the nearest ones so
    calibrated  where that was done in another way: every one of ``wanted``
    ``apply`` raises ExportError if one of them is not multiplied with as expected.
    """

    how: WeightQuantization
    wanted: frozenset[str]
    calibrated: Mapping[str, PackedTensor] = field(default_factory=dict)

    def apply(self, graphs: Sequence[TracedGraph], store: WeightStore) -> None:
        quantized = exchange_weights(graphs, store, self._quantized)
        if left := sorted(self.wanted - quantized):
            raise ExportError(f"{left[0]} is no plain MatMul; leave --weights out")

    def _quantized(self, name: str, weight: Expression) -> QuantizedWeight | None:
        """The quantized form of a weight [K,N]."""
        if not sources(weight) <= self.wanted:
            return None
        self.how.check(name, weight.shape[0])
        if not self.calibrated:
            return RoundedWeight(weight, self.how)
        parts = parts_of(weight, self.calibrated)
        return None if parts is None else PackedWeight(weight, parts)
