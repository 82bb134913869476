"""OpenVINO on x86 CPUs.

Its reader takes no functions, no TensorScatter, no Scan that reads values around it, and makes
Attention out of parts that copy keys and values: functions are inlined, cache writes are left to
the backend, Scan becomes Loop, attention is decomposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lvlm.export.targets.description import FLOATS
from lvlm.export.targets.target import Target
from lvlm.runtime.bundle.manifest import Capacity

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class OpenVino(Target):
    """Graphs with other inputs and outputs than the canonical ones (``_host_writes``)."""

    def lower(self, model: ir.Model, capacity: Capacity) -> None:  # noqa: ARG002
        from onnx_ir.passes import common

        from lvlm.export.targets.passes import graph_edits, host_writes, loops
        from lvlm.export.targets.passes.lowering import check

        check(model, self)
        host_writes.leave_writes_to_host(model)
        graph_edits.decompose_attention(model)
        common.InlinePass()(model)
        loops.scans_to_loops(model)
        common.RemoveUnusedOpsetsPass()(model)
        graph_edits.lower_opset(model, self.opset)


TARGET = OpenVino(
    name="openvino",
    summary="OpenVINO on x86 CPUs: attention decomposed, the cache written by the backend",
    flavour="openvino",
    version=(2026,),
    platform="x86 CPUs, OpenVINO 2026.4 or newer",
    sms=(),
    opset=24,
    imports=frozenset({"RMSNormalization", "RotaryEmbedding"}),
    attention=frozenset(),
    matmul_types=FLOATS,
    plugins=False,
    static_cache=False,
    topk_limit=None,
    verified="2026.4: every recipe gives the tokens of device cpu",
)
