"""Blocks that are alike are traced once, and each keeps its own weights."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lvlm.core.errors import ExportError
from lvlm.export.graphs.graph import BundleGraph, Tensors
from lvlm.export.graphs.repeats import collected, like, repeated
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


def body(block: nn.Module, hidden: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"other": other * 2, "hidden": block(hidden, other)}


class Model(BundleGraph):
    """hidden [B,N,4] and other [B,M,4] through all blocks; what these give of ``other``, too."""

    name = "toy"

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(i, f) for i, f in enumerate(factors)])
        self.width = 4

    def inputs(self) -> list[GraphPort]:
        return [
            GraphPort("hidden", torch.float32, ("batch", "sequence", 4)),
            GraphPort("other", torch.float32, ("batch", "others", 4)),
        ]

    def outputs(self) -> list[GraphPort]:
        return [
            GraphPort("out", torch.float32, ("batch", "sequence", 4)),
            GraphPort("rest", torch.float32, ("batch", "others", 4)),
        ]

    def compute(self, given: Tensors) -> dict[str, torch.Tensor]:
        taken = dict(given)
        for block in self.blocks:
            size = (*given["hidden"].shape[:2], self.width)
            said = {"hidden": (torch.float32, size), "other": like(taken["other"])}
            taken = repeated(body, block, taken, said)
        return {"rest": taken["other"], "out": taken["hidden"]}


def traced(model: Model) -> TracedGraph:
    checkpoint = nn.ModuleDict({"weights": model})
    return trace(model, checkpoint, FakeTensorMode(allow_non_fake_inputs=True))


def test_blocks_with_other_settings_are_another_kind() -> None:
    model = Model(1.0, 1.0, 2.0, 1.0)
    model.blocks[3].linear = nn.Linear(4, 4, bias=False)
    with collected() as repeats:
        model({"hidden": torch.zeros(1, 2, 4), "other": torch.zeros(1, 3, 4)})
    assert [kind.module for kind in repeats.kinds] == [model.blocks[i] for i in (0, 2, 3)]
    assert repeats.modules == list(model.blocks)


def test_activations_made_of_partial_are_settings() -> None:
    """As transformers' gelu_pytorch_tanh."""
    model = Model(1.0, 1.0, 1.0, 1.0)
    for block, how in zip(model.blocks, ("tanh", "tanh", "none", "tanh"), strict=True):
        block.act = partial(nn.functional.gelu, approximate=how)
    model.blocks[3].act = partial(nn.functional.silu, approximate="tanh")
    with collected() as repeats:
        model({"hidden": torch.zeros(1, 2, 4), "other": torch.zeros(1, 3, 4)})
    assert [kind.module for kind in repeats.kinds] == [model.blocks[i] for i in (0, 2, 3)]


def test_every_block_has_its_own_weights() -> None:
    model = Model(1.0, 1.0, 2.0)
    graph = traced(model)
    assert list(graph.parameters) == [
        f"weights.blocks.{i}.linear.{kind}" for i in range(3) for kind in ("weight", "bias")
    ]
    for name, value in graph.parameters.items():
        value.const_value = ir.tensor(model.get_parameter(name.removeprefix("weights.")).detach())
    assert {n.domain for n in graph.model.graph} == {""}
    given = {"hidden": torch.randn(2, 3, 4), "other": torch.randn(2, 5, 4)}
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {name: x.numpy() for name, x in given.items()})
    for said, x in zip(model(given).values(), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(x), said)
    assert [str(d) for d in graph.model.graph.outputs[0].shape or ()] == ["batch", "sequence", "4"]


def test_what_a_block_gives_is_compared_with_what_was_said() -> None:
    model = Model(1.0)
    model.width = 3
    with pytest.raises(ExportError, match="not the"):
        traced(model)
