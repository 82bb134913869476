"""A plugin library for tests, built once per run: every op in one data type, for one architecture,
beside plugins of the tests' own for two others."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from example_plugin import EXAMPLE, count_up
from filelock import FileLock

from lvlm.core.discovery import discover
from lvlm.core.progress import Progress
from lvlm.export.ops.op import Op, OpSample
from lvlm.plugins_trt.plugins import library_build
from lvlm.plugins_trt.plugins.kernel_compiler import Compiled, compile_kernels
from lvlm.plugins_trt.plugins.kernels import Kernel, all_kernels
from lvlm.plugins_trt.plugins.library_harness import Harness, fields_of, inputs_of, write_case
from lvlm.plugins_trt.plugins.plugin_plan import DATA, Output, Plugin, PluginInput, PluginStep
from lvlm.plugins_trt.plugins.registry import plugins
from lvlm.plugins_trt.plugins.sizes import Size, const, extent, numel
from lvlm.plugins_trt.plugins.sources import write_sources

OPS_ARCH, OPS_FLOAT = 87, "float16"
EXAMPLE_ARCHS, EXAMPLE_FLOATS = [86, 90], ("float32", "float16")
OPS: dict[str, Op] = discover("lvlm.export.ops", "OP")
PARAMETER_BYTES = {"i32": 4, "fp32": 4}


# Of numbers that are not negative, into such numbers
OPERATIONS: list[Callable[[Size, Size], Size]] = [
    lambda a, b: a + b,
    lambda a, b: a.at_least(b) - b,
    lambda a, b: a * b,
    lambda a, b: a // b.at_least(1),
    lambda a, b: a.ceil_div(b.at_least(1)),
    lambda a, b: a.at_least(b),
    lambda a, b: a.at_most(b),
]


def random_size(seed: int) -> Size:
    chance = random.Random(seed)
    leaves = [extent("left", 0), extent("left", -1), extent("right", 1), numel("right"), const(3)]
    size = chance.choice(leaves)
    for _ in range(chance.randrange(1, 6)):
        size = chance.choice(OPERATIONS)(size, chance.choice(leaves))
    return size


SIZES = [random_size(seed) for seed in range(40)]
# Each expression as an output's extent, which TensorRT's expressions compute, and as an argument,
# which numbers do.
SIZES_PLUGIN = Plugin(
    name="Sizes",
    inputs=(PluginInput("left", "float32", (2, 3)), PluginInput("right", "float32", (2,))),
    outputs=tuple(Output(f"out{i}", "float32", (size,)) for i, size in enumerate(SIZES)),
    steps=tuple(
        PluginStep(
            kernel=count_up,
            grid=(const(1),),
            arguments=("right", "out0", size),
            constants={"BLOCK": 64},
        )
        for size in SIZES
    ),
)
TEST_PLUGINS = (EXAMPLE, SIZES_PLUGIN)


@dataclass(frozen=True)
class Built:
    """A library and how to run it on a GPU that is not there."""

    harness: Harness
    folder: Path
    compiled: Compiled

    @property
    def library(self) -> Path:
        return self.harness.library

    def case(
        self,
        folder: Path,
        plugin: Plugin,
        tensors: Sequence[torch.Tensor | None],
        attributes: Mapping[str, Any],
        *,
        data: bool = False,
        name: str = "case",
    ) -> Path:
        fields = fields_of(plugin, attributes)
        return write_case(folder / name, plugin.name, fields, inputs_of(plugin, tensors), data=data)

    def fake_gpu(self, folder: Path, sm: int, **more: str) -> dict[str, str]:
        """The environment in which the harness finds a GPU that only notes what it is told."""
        environment = {
            "LD_LIBRARY_PATH": str(self.folder / "fake"),
            "FAKE_CUDA_SM": str(sm),
            "FAKE_CUDA_LOG": str(folder / "launches"),
            "FAKE_CUDA_PARAMETERS": str(self.folder / "parameters"),
        }
        (folder / "launches").write_text("")
        return environment | more


def make(folder: Path, headers: Path) -> Built:
    """The library, below ``folder``; made by one process, waited for by the others."""
    with FileLock(f"{folder}.lock"):
        if not (folder / "compiled").exists():
            folder.mkdir(exist_ok=True)
            _build(folder, headers)
        compiled = pickle.loads((folder / "compiled").read_bytes())
    harness = Harness(folder / "build/liblvlm_plugins.so", folder / "build/lvlm_plugin_harness")
    return Built(harness, folder, compiled)


def _build(folder: Path, headers: Path) -> None:
    progress = Progress(2, quiet=True)
    ops = list(plugins().values())
    own = all_kernels(TEST_PLUGINS, EXAMPLE_FLOATS)
    compiled = compile_kernels(own, EXAMPLE_ARCHS, jobs=1, progress=progress)
    compiled |= compile_kernels(all_kernels(ops, (OPS_FLOAT,)), [OPS_ARCH], jobs=1,
                                progress=progress)  # fmt: skip
    library_build.copy_shell(folder / "source")
    write_sources(folder / "source", [*ops, *TEST_PLUGINS], compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMAKE_BUILD_TYPE", "None")  # not optimised: half the compiler's time
        for target in ("lvlm_plugins", library_build.HARNESS):
            library_build.run_cmake(
                folder / "source", folder / "build", target, library_build.Headers(headers), 1
            )
    _fake(folder)
    (folder / "parameters").write_text("\n".join(map(_parameters, compiled.items())))
    (folder / "compiled").write_bytes(pickle.dumps(compiled))


def _fake(folder: Path) -> None:
    (folder / "fake").mkdir(exist_ok=True)
    include = library_build.triton_headers()
    assert include is not None
    subprocess.run(
        [
            *(os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC"),
            *(
                "-isystem",
                str(include / "include"),
                str(library_build.SHELL / "test/fake_cuda.cpp"),
            ),
            *("-o", str(folder / "fake/libcuda.so.1")),
        ],
        check=True,
    )


def _parameters(entry: tuple[Kernel, Sequence[Any]]) -> str:
    kernel, images = entry
    sizes = [PARAMETER_BYTES.get(kind, 8) for kind in kernel.parameters]
    return " ".join(map(str, (images[0].entry, *sizes, *[8] * images[0].extras)))


def samples(name: str) -> list[OpSample]:
    """Those that the plugin has kernels for."""
    plugin = plugins()[name]
    words = plugin.words()
    return [
        s for s in OPS[name].samples() if s.attributes.get(plugin.variant or "") in (None, *words)
    ]


def shapes_of(plugin: Plugin, tensors: Sequence[torch.Tensor | None]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in inputs_of(plugin, tensors)}


def data_type(plugin: Plugin, tensors: Sequence[torch.Tensor | None]) -> str:
    kinds = {spec.name: spec.dtype for spec in plugin.inputs}
    types = [t.dtype for name, t in inputs_of(plugin, tensors) if kinds[name] == DATA]
    return str(types[0]).removeprefix("torch.") if types else "float32"


def example_inputs(dtype: torch.dtype, *, weighted: bool = False) -> list[torch.Tensor]:
    source = torch.arange(40.0).reshape(5, 8).to(dtype)
    bias = torch.arange(6.0).reshape(2, 3)
    weight = [torch.tensor([0.5, -1.0, 2.0])] if weighted else []
    return [source, torch.tensor([3, 0, 4]), bias, *weight]


def named_inputs(**changes: torch.Tensor | None) -> list[tuple[str, torch.Tensor]]:
    inputs: dict[str, torch.Tensor | None] = dict(
        inputs_of(EXAMPLE, example_inputs(torch.float16, weighted=True))
    )
    return [(name, tensor) for name, tensor in (inputs | changes).items() if tensor is not None]
