"""ONNX Runtime's CPU provider: decode, and graphs with quantized weights, in the operators that it
is fastest with.

Written with every bundle that it can run; device ``cpu`` runs it in the canonical graph's place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lvlm.export.targets.description import NEW_OPS
from lvlm.export.targets.target import Target
from lvlm.runtime.bundle.manifest import Capacity

if TYPE_CHECKING:
    import onnx_ir as ir

TYPES = frozenset({"float32", "float16"})
GRAPHS = ("decode", "prefill", "extend")  # the others are no faster lowered


@dataclass(frozen=True)
class OrtCpu(Target):
    """Lowers some of the graphs only."""

    def lower(self, model: ir.Model, capacity: Capacity) -> None:  # noqa: ARG002
        from onnx_ir.passes import common

        from lvlm.export.targets.passes.block_linears import use_block_linears
        from lvlm.export.targets.passes.last_rows import keep_last_rows
        from lvlm.export.targets.passes.ort_attention import group_attention
        from lvlm.export.targets.passes.ort_extend import extend_attention
        from lvlm.export.targets.passes.ort_fusions import (
            MICROSOFT,
            fuse_silu,
            fuse_skip_normalization,
        )
        from lvlm.export.targets.passes.ort_linears import use_linears
        from lvlm.export.targets.passes.ort_prefill import chunk_attention

        keep_last_rows(model)
        extend_attention(model)
        done = group_attention(model)
        done += fuse_skip_normalization(model) + fuse_silu(model) + use_block_linears(model)
        common.RemoveUnusedNodesPass()(model)  # drops outputs that nobody reads, too: before this
        chunk_attention(model)
        use_linears(model)
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        if done:
            model.opset_imports[MICROSOFT] = 1

    def lowers(self, graphs: Iterable[str]) -> list[str]:
        return [name for name in graphs if name in GRAPHS]

    def write(self, bundle: Path, graphs: Mapping[str, str], capacity: Capacity) -> list[str]:
        from lvlm.export.targets.passes.block_linears import has_quantized_weights

        wanted = {
            name: file
            for name, file in graphs.items()
            if name in GRAPHS or has_quantized_weights(bundle / file)
        }
        return super().write(bundle, wanted, capacity)


TARGET = OrtCpu(
    name="ort-cpu",
    summary="ONNX Runtime's CPU provider: decode with its own attention; written anyway",
    flavour="onnxruntime",
    version=(1,),
    platform="CPUs, onnxruntime 1.31 or newer",
    sms=(),
    opset=24,
    imports=NEW_OPS,
    attention=TYPES,
    matmul_types=TYPES,
    plugins=False,
    static_cache=False,
    topk_limit=None,
    verified="1.31: every recipe gives the tokens of the canonical graphs",
    low_precision=True,
)
