"""Programs without anything to decompose are translated as they are; the others are decomposed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from lvlm.export.graphs.torch_export import to_onnx
from lvlm.export.ports import GraphPort

INPUTS = [GraphPort("x", torch.float32, ("batch", "sequence", 4))]


class Toy(nn.Module):
    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"out": self.compute(given["x"])}


def converted(x: torch.Tensor) -> torch.Tensor:
    """Two conversions that change nothing, of which one is the output, and two that do."""
    pairs = (x.float() + x).reshape(x.shape[0], -1, 2).half()
    return (pairs * pairs).to(torch.float32).float()


def written(x: torch.Tensor) -> torch.Tensor:
    rows = x * 2
    rows[:, 1] = 0.0
    return rows.add_(1)


@pytest.mark.parametrize(
    ("compute", "calls"),
    [
        (converted, 0),
        (written, 1),
        (lambda x: (x + 1).flatten(0, 1), 1),
        (nn.functional.softshrink, 1),
    ],
    ids=["conversions", "in-place", "flatten", "no-translation"],
)
def test_as_torch_computes_it(
    compute: Callable[[torch.Tensor], torch.Tensor], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[None] = []
    own = ExportedProgram.run_decompositions

    def counted(program: ExportedProgram, *given: object) -> ExportedProgram:
        seen.append(None)
        return own(program, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    model = to_onnx("toy", Toy(compute), INPUTS, ["out"], FakeTensorMode())
    assert len(seen) == calls
    if calls == 0:  # a conversion to the type that a tensor has already left nothing
        casts = [n.attributes["to"].as_int() for n in model.graph if n.op_type == "Cast"]
        assert [to for to in casts if to != ir.DataType.INT64] == [
            ir.DataType.FLOAT16, ir.DataType.FLOAT,
        ]  # fmt: skip
    x = torch.randn(2, 3, 4)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, compute(x.clone()).numpy(), rtol=3e-3, atol=1e-4)
