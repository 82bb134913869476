"""``lvlm::CacheCompact``: contract, ONNX function, samples."""

from lvlm.export.ops.cache_compact.contract import OP

__all__ = ["OP"]
