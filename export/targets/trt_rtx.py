"""TensorRT-RTX: portable graphs, built ahead of time on any machine, run on RTX GPUs.

What differs from the canonical graphs: the cache's length is static (KVCacheUpdate asks for it),
causal attention is the standard op (its kernel is the fused one), and fp32 attention of several
query rows is written out (there is no fp32 kernel for it).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from lvlm.export.targets._base import target_file
from lvlm.export.targets._passes import fix_dimensions, lower_ops, write_out_attention
from lvlm.runtime.bundle import Capacity


class TrtRtx:
    """See Target."""

    name = "trt-rtx"
    summary = "NVIDIA TensorRT-RTX: static cache length, fp32 attention written out"

    def lower(self, model: ir.Model, capacity: Capacity) -> None:
        fix_dimensions(model, {f"capacity_{i}": c for i, c in enumerate(capacity.per_layer)})
        lower_ops(model)
        write_out_attention(model)

    def write(self, bundle: Path, graphs: Mapping[str, str], capacity: Capacity) -> None:
        for file in graphs.values():
            model = ir.load(bundle / file)
            self.lower(model, capacity)
            for value in model.graph.initializers.values():
                _keep_external(value)
            ir.save(model, bundle / target_file(file, self.name))


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


TARGET = TrtRtx()
