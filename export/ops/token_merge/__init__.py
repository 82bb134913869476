"""``lvlm::TokenMerge``: contract, ONNX function, samples."""

from lvlm.export.ops.token_merge.contract import OP

__all__ = ["OP"]
