"""What torch does to a program before it is translated is left out where it changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch._export.passes import replace_set_grad_with_hop_pass
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


def idle(x: torch.Tensor) -> torch.Tensor:
    """What gives its input as it is, in the middle and at the end."""
    turned = nn.functional.dropout(x.transpose(1, 2).contiguous(), 0.5, training=False)
    return nn.functional.dropout(turned * 2, training=False)


def convolved(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.conv2d(x[:, None], torch.ones(2, 1, 1, 2), None, (1, 2), "valid")


def padded(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.conv2d(x[:, None], torch.ones(2, 1, 1, 3), None, 1, "same")


@pytest.mark.parametrize(
    ("compute", "calls"),
    [
        (converted, 0),
        (written, 1),
        (lambda x: (x + 1).flatten(0, 1), 0),
        (lambda x: x.flatten(1), 0),
        (lambda x: x.flatten(start_dim=1, end_dim=-1), 0),
        (lambda x: x + x.sum().flatten(), 1),
        (lambda x: x.reshape(-1, 2, 2).flatten(-2, -1), 0),
        (idle, 0),
        (convolved, 0),
        (padded, 1),
        (nn.functional.softshrink, 1),
    ],
    ids=[
        *("conversions", "in-place", "flatten", "flatten-to-the-end", "flatten-by-name"),
        *("flatten-of-a-number", "flatten-after-reshape"),
        *("dropout-and-contiguous", "convolution", "padded-convolution", "no-translation"),
    ],
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
    if compute is converted:  # a conversion to the type that a tensor has already left nothing
        casts = [n.attributes["to"].as_int() for n in model.graph if n.op_type == "Cast"]
        assert [to for to in casts if to != ir.DataType.INT64] == [
            ir.DataType.FLOAT16, ir.DataType.FLOAT,
        ]  # fmt: skip
    assert "Dropout" not in {node.op_type for node in model.graph}
    for x in (torch.randn(2, 3, 4), torch.randn(2, 0, 4)):
        if compute in (written, convolved, padded) and not x.numel():
            continue
        np.testing.assert_allclose(run(model, x), compute(x.clone()), rtol=3e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [lambda x: x.flatten(0, 1), lambda x: x.reshape(-1, 4)])
def test_a_size_of_0_is_one(shape: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """And not, as Reshape has it unless told, the input's own size at that place."""
    model = to_onnx("toy", Toy(shape), INPUTS, ["out"], FakeTensorMode())
    assert [*model.graph][-1].attributes["allowzero"].as_int() == 1


def mixed(x: torch.Tensor) -> torch.Tensor:
    """Whole numbers with fractions, among them a quotient of two whole ones."""
    places = torch.arange(x.shape[1])
    return (x * places[:, None] + places[:, None] / 3) ** 2 + (places == 1)[:, None]


def test_types_are_promoted_without_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that nothing is inserted for are not run again."""
    ran: list[str] = []
    own = torch.fx.Interpreter.run_node

    def noted(interpreter: torch.fx.Interpreter, n: torch.fx.Node) -> object:
        ran.append(str(n.target))
        return own(interpreter, n)

    monkeypatch.setattr(torch.fx.Interpreter, "run_node", noted)
    model = to_onnx("toy", Toy(mixed), INPUTS, ["out"], FakeTensorMode())
    assert "prims.convert_element_type.default" in ran
    assert "aten.arange.default" not in ran
    x = torch.randn(2, 3, 4)
    np.testing.assert_allclose(run(model, x), mixed(x), rtol=1e-5)


@torch.no_grad()
def half(x: torch.Tensor) -> torch.Tensor:
    return x / 2


def test_no_grad_leaves_nothing_in_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    split: list[torch.fx.GraphModule] = []
    own = replace_set_grad_with_hop_pass.sequential_split

    def noted(module: torch.fx.GraphModule, *given: Any) -> Any:
        split.append(module)
        return own(module, *given)

    monkeypatch.setattr(replace_set_grad_with_hop_pass, "sequential_split", noted)
    compute = Toy(lambda x: half(x) + 1)
    to_onnx("toy", compute, INPUTS, ["out"], FakeTensorMode())
    assert not split
    with torch.no_grad():
        torch.export.export(compute, ({"x": torch.zeros(1, 2, 4)},), strict=False)
    assert split  # torch still does, where it is not kept from it


def test_no_grad_is_as_before_after_an_export() -> None:
    model = to_onnx("toy", Toy(half), INPUTS, ["out"], FakeTensorMode())
    assert [node.op_type for node in model.graph][-1] == "Div"

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"told {x.dtype}")

    with pytest.raises(ValueError, match="told"):
        to_onnx("toy", Toy(fail), INPUTS, ["out"], FakeTensorMode())
    x = torch.ones(1, requires_grad=True)
    assert (x / 2).requires_grad
    assert not half(x).requires_grad
    assert torch.is_grad_enabled()


def run(model: ir.Model, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    (found,) = session.run(None, {"x": x.numpy()})
    return np.asarray(found)
