"""``lvlm::GatedDeltaRule``: contract, ONNX functions, samples."""

from lvlm.export.ops.gated_delta_rule.contract import OP

__all__ = ["OP"]
