"""Blocks that are alike are traced once, and each keeps its own weights."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lvlm.core.errors import ExportError
from lvlm.export.graphs.repeats import Described, collected, like, repeated
from lvlm.export.graphs.tracing import TracedGraph, trace
from lvlm.export.ports import GraphPort


class Block(nn.Module):
    def __init__(self, number: int, factor: float) -> None:
        super().__init__()
        self.layer_idx, self.factor = number, factor
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = hidden + self.factor * self.linear(hidden) + other.mean(1)[:, None]
        return mixed


def body(block: nn.Module, hidden: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return block(hidden, other), other * 2


class Model(nn.Module):
    """hidden [B,N,4] and other [B,M,4] through all blocks; what these give of ``other``, too."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(i, f) for i, f in enumerate(factors)])
        self.width = 4

    def forward(
        self, hidden: torch.Tensor, other: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for block in self.blocks:
            said: list[Described] = [(hidden.dtype, (*hidden.shape[:2], self.width)), like(other)]
            hidden, other = repeated(body, block, [hidden, other], said)
        return hidden, other


def traced(model: Model) -> TracedGraph:
    inputs = [
        GraphPort("hidden", torch.float32, ("batch", "sequence", 4)),
        GraphPort("other", torch.float32, ("batch", "others", 4)),
    ]
    names = {id(p): f"weights.{n}" for n, p in model.named_parameters()}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return trace("toy", model, inputs, ["out", "rest"], tuple, names, mode)


def test_blocks_with_other_settings_are_another_kind() -> None:
    model = Model(1.0, 1.0, 2.0, 1.0)
    model.blocks[3].linear = nn.Linear(4, 4, bias=False)
    with collected() as repeats:
        model(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))
    assert [kind.module for kind in repeats.kinds] == [model.blocks[i] for i in (0, 2, 3)]
    assert repeats.modules == list(model.blocks)


def test_every_block_has_its_own_weights() -> None:
    model = Model(1.0, 1.0, 2.0)
    graph = traced(model)
    assert list(graph.parameters) == [
        f"weights.blocks.{i}.linear.{kind}" for i in range(3) for kind in ("weight", "bias")
    ]
    for name, value in graph.parameters.items():
        value.const_value = ir.tensor(model.get_parameter(name.removeprefix("weights.")).detach())
    assert {n.domain for n in graph.model.graph} == {""}
    hidden, other = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {"hidden": hidden.numpy(), "other": other.numpy()})
    for said, x in zip(model(hidden, other), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(x), said)
    assert [str(d) for d in graph.model.graph.outputs[0].shape or ()] == ["batch", "sequence", "4"]


def test_what_a_block_gives_is_compared_with_what_was_said() -> None:
    model = Model(1.0)
    model.width = 3
    with pytest.raises(ExportError, match="not the"):
        traced(model)
