"""Quantized checkpoints: what is read of every layout, and what is refused of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packing
import pytest
import torch
from checkpoint_tools import plan
from packing import (
    Rounded,
    as_awq,
    as_compressed,
    as_gptq,
    compressed_settings,
    is_linear,
    quantize_folder,
    round_weight,
)
from safetensors.torch import load_file, save_file
from settings import ASSETS

from lvlm.core.discovery import discover
from lvlm.core.errors import CheckpointError, LvlmError, ParameterError
from lvlm.export.checkpoint import checkpoint as checkpoints
from lvlm.export.summaries import plan_data, plan_table

SOURCE = ASSETS / "digits-llava"
UP = "language_model.model.layers.0.mlp.up_proj"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}

Write = Callable[[str, np.ndarray], tuple[packing.Tensors, np.ndarray]]


def writer(make: Callable[[str, Rounded], packing.Tensors], bits: int, group: int,
           **how: Any) -> Write:  # fmt: skip
    def write(name: str, weight: np.ndarray) -> tuple[packing.Tensors, np.ndarray]:
        rounded = round_weight(weight, bits, group or weight.shape[1], **how)
        return make(name, rounded), rounded.dense()

    return write


AWQ_WRITER = writer(as_awq, 4, 64, symmetric=False)
# Settings, how to write, and what the report says of bits, groups and zero points
LAYOUTS: dict[str, tuple[dict[str, Any], Write, str]] = {
    "awq": (AWQ, AWQ_WRITER, "AWQ, int4 in groups of 64 with zero points (7 layers)"),
    "gptq": (GPTQ, writer(as_gptq, 4, 32, symmetric=True), "GPTQ, int4 in groups of 32 (7"),
    "gptq-zeros": (
        GPTQ | {"sym": False, "group_size": 64},
        writer(as_gptq, 4, 64, symmetric=False),
        "GPTQ, int4 in groups of 64 with zero points",
    ),
    "gptq-v2-int8": (
        GPTQ | {"bits": 8, "sym": False, "checkpoint_format": "gptq_v2", "group_size": -1},
        writer(lambda n, r: as_gptq(n, r, 8, 0), 8, 0, symmetric=False),
        "GPTQ, int8 with a scale per output with zero points",
    ),
    "compressed": (
        compressed_settings(4, 32, symmetric=True),
        writer(as_compressed, 4, 32, symmetric=True),
        "compressed-tensors, int4 in groups of 32 (7",
    ),
    "compressed-zeros": (
        compressed_settings(4, 64, symmetric=False),
        writer(lambda n, r: as_compressed(n, r, symmetric=False), 4, 64, symmetric=False),
        "compressed-tensors, int4 in groups of 64 with zero points",
    ),
    "compressed-int8": (
        compressed_settings(8, 64, symmetric=True),
        writer(lambda n, r: as_compressed(n, r, 8), 8, 64, symmetric=True),
        "compressed-tensors, int8 in groups of 64 (7",
    ),
}


USUAL = ("awq", "gptq", "gptq-v2-int8", "compressed-zeros", "blocks")


@pytest.fixture(scope="module")
def made_awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_folder(SOURCE, tmp_path_factory.mktemp("made") / "awq", AWQ, AWQ_WRITER)


@pytest.fixture
def awq(made_awq: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_awq, tmp_path / "awq"))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Tensors of the first layer's up_proj, by the end of their names; None: away with it."""
    weights = load_file(folder / "model.safetensors")
    for end, tensor in tensors.items():
        if tensor is None:
            del weights[f"{UP}.{end}"]
        else:
            weights[f"{UP}.{end}"] = tensor
    save_file(weights, folder / "model.safetensors")


def settings(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(values)
    (folder / "config.json").write_text(json.dumps(config))


def only_whole(config: pytest.Config, layout: str) -> None:
    """Skip what differs from others in little, in a normal run."""
    if layout not in USUAL and not config.getoption("--whole"):
        pytest.skip("with --whole")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_as_what_it_stands_for(
    layout: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    only_whole(pytestconfig, layout)
    given, write, words = LAYOUTS[layout]
    folder = quantize_folder(SOURCE, tmp_path / "packed", given, write)
    found = checkpoints.resolve(str(folder))
    assert words in found.forms[0].words
    dense = load_file(tmp_path / "packed-dense/model.safetensors")
    assert set(found.tensors) == set(dense)
    assert set(found.packed) == {name for name in dense if is_linear(name, "0.")}
    for name in dense:
        assert torch.equal(found.read(name), dense[name]), name


def test_bytes_are_those_of_what_stays(awq: Path) -> None:
    made = plan(awq, dtype="fp32")
    assert len(made.packed) == 7
    saved = 0.0
    for outputs, inputs in (tensor.shape for tensor in made.packed.values()):
        block = 64 if inputs // 64 % 2 == 0 else 32
        # Of 4 bytes a half is left, and for each block a scale of 4 and a zero point of a half
        saved += outputs * inputs * (3.5 - 4.5 / block)
    assert plan(SOURCE, dtype="fp32").weight_bytes - made.weight_bytes == saved


def test_a_dry_run_says_what_becomes_of_it(awq: Path) -> None:
    def said(**options: Any) -> str:
        return " ".join(plan_table(plan(awq, dtype="fp32", **options)).split())

    kept = said()
    assert "form AWQ, int4 in groups of 64 with zero points (7 layers); safetensors, 1 file" in kept
    assert "of the linear layers 6 as int4 in blocks of 32, 1 as int4 in blocks of 64" in kept
    assert "14.8 MB of it while a plain copy is compared with" in kept
    assert "plain copy" not in said(validate=False)
    assert "14.8 MB as float32, dequantized" in said(dequantize=True)
    anew = said(dequantize=True, weights="int8")
    assert "43 linear layers quantized to int8 in blocks of 32" in anew
    data = plan_data(plan(awq, dtype="fp32"))
    assert data["quantized_layers"] == 7
    assert data["weights"] == {"bits": 4, "block": 32}
    assert data["plain_copy_bytes"] == sum(
        4 * tensor.numel() for tensor in load_file(SOURCE / "model.safetensors").values()
    )


def test_groups_in_act_order_are_made_dense_on_request(tmp_path: Path) -> None:
    order = np.random.default_rng(5).permutation(192) // 64

    def write(name: str, weight: np.ndarray) -> tuple[packing.Tensors, np.ndarray]:
        rounded = round_weight(weight, 4, 64, symmetric=True)
        if weight.shape[1] != 192:
            return as_gptq(name, rounded), rounded.dense()
        return as_gptq(name, rounded, order=order), rounded.dense(order)

    folder = quantize_folder(SOURCE, tmp_path / "packed", GPTQ | {"desc_act": True}, write)
    with pytest.raises(ParameterError, match=r"cannot stay so: act-order.*give --dequantize"):
        plan(folder, dtype="fp32")
    made = plan(folder, dtype="fp32", dequantize=True)
    dense = load_file(tmp_path / "packed-dense/model.safetensors")
    for name in dense:
        assert torch.equal(made.checkpoint.read(name), dense[name]), name
    settings(folder, desc_act=False)  # what the files say counts
    with pytest.raises(CheckpointError, match="g_idx is in act-order"):
        plan(folder, dtype="fp32").checkpoint.read(f"{UP}.weight")


def test_act_order_with_groups_in_order_stays_packed(tmp_path: Path) -> None:
    write = LAYOUTS["gptq"][1]
    folder = quantize_folder(SOURCE, tmp_path / "packed", GPTQ | {"desc_act": True}, write)
    assert len(plan(folder, dtype="fp32").packed) == 7


def fp8(scale: str, shape: Callable[[int, int], tuple[int, int]]) -> Write:
    """Weights with one scale for each of equal blocks, the last of which are cut short."""

    def write(name: str, weight: np.ndarray) -> tuple[packing.Tensors, np.ndarray]:
        outputs, inputs = weight.shape
        rows, columns = shape(outputs, inputs)
        blocks = (-(-outputs // rows), -(-inputs // columns))
        scales = np.zeros(blocks, np.float32)
        narrow = torch.zeros(outputs, inputs, dtype=torch.float8_e4m3fn)
        dense = np.zeros_like(weight)
        for i in range(blocks[0]):
            for j in range(blocks[1]):
                at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scales[i, j] = np.abs(weight[at]).max() / 448
                narrow[at] = torch.from_numpy(weight[at] / scales[i, j]).to(narrow.dtype)
                dense[at] = narrow[at].float().numpy() * scales[i, j]
        made = {f"{name}.weight": narrow, f"{name}.{scale}": torch.from_numpy(scales)}
        return made, dense

    return write


FLOATS: dict[str, tuple[dict[str, Any], Write]] = {
    "blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        fp8("weight_scale_inv", lambda *_: (128, 128)),
    ),
    "outputs": ({"quant_method": "fbgemm_fp8"}, fp8("weight_scale", lambda _, k: (1, k))),
    "compressed": (
        compressed_settings(8, 0, symmetric=True, form="float-quantized",
                            input_activations={"num_bits": 8}),
        fp8("weight_scale", lambda n, k: (n, k)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", FLOATS)
def test_fp8_is_dequantized_on_request_only(
    layout: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    only_whole(pytestconfig, layout)
    folder = quantize_folder(SOURCE, tmp_path / "packed", *FLOATS[layout])
    with pytest.raises(ParameterError, match=r"cannot stay so: .*give --dequantize"):
        plan(folder, dtype="fp32")
    made = plan(folder, dtype="fp32", dequantize=True)
    assert not made.packed
    dense = load_file(tmp_path / "packed-dense/model.safetensors")
    assert set(made.checkpoint.tensors) == set(dense)
    for name in dense:
        torch.testing.assert_close(made.checkpoint.read(name), dense[name], rtol=1e-6, atol=0)
    anew = plan(folder, dtype="fp32", dequantize=True, weights="int4")
    assert anew.weight_bytes < made.weight_bytes / 2


@pytest.mark.parametrize(
    ("changed", "tensors", "message"),
    [
        ({"bits": 3}, {}, r"with AWQ, 3 bits; 4 are supported"),
        ({"version": "gemv"}, {}, r"version gemv; gemm is supported"),
        ({"quant_method": "bitsandbytes"}, {}, r"bitsandbytes.* with --weights int4, or load this"),
        ({"quant_method": "quark"}, {}, r"with quark .* which is not read; read are awq, "),
        ({"quant_method": "gptq", "bits": 2}, {}, r"with GPTQ, 2 bits"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, {}, r"checkpoint_format marlin"),
        ({}, {"scales": None}, r"lacks the weight .*up_proj\.scales"),
        ({}, {"qzeros": torch.zeros(3, 3).int()}, r"up_proj\.qzeros has shape \[3, 3\]"),
        ({}, {"scales": torch.zeros(3, 8)}, r"up_proj\.qweight has shape"),
        ({}, {"scales": torch.zeros(3)}, r"up_proj\.scales has shape \[3\]"),
        ({"quant_method": "compressed-tensors"}, {}, r"without config_groups"),
        (compressed_settings(4, 32, symmetric=True), {}, r"none is named \*\.weight_packed"),
        (compressed_settings(4, 32, symmetric=True, form="marlin-24"), {}, r"format marlin-24"),
    ],
)
def test_what_is_not_supported_is_named(
    awq: Path, changed: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    settings(awq, **changed)
    change(awq, **tensors)
    with pytest.raises(LvlmError, match=message) as caught:
        plan(awq)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int4"}, r"--weights int4: the checkpoint is quantized \(AWQ.*--dequantize"),
        ({"dtype": "bf16"}, r"stays quantized goes with --dtype fp32 or fp16.* or give --dequan"),
    ],
)
def test_options_that_do_not_go_with_it(awq: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        plan(awq, **options)
    assert not plan(awq, **options, dequantize=True).packed


def test_a_target_that_takes_no_integers(awq: Path) -> None:
    targets = discover("lvlm.export.targets", "TARGET")
    assert plan(awq, targets=(targets["trt-11"],)).packed
    target = targets["jetson-orin-jp62"]
    with pytest.raises(ParameterError, match=r"jp62 does not take int4 weights, which the .*deq"):
        plan(awq, targets=(target,))
    assert plan(awq, targets=(target,), dequantize=True).options.targets == (target,)


def test_nothing_to_dequantize(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"--dequantize: the checkpoint is not quantized"):
        plan(SOURCE, dequantize=True)
    (tmp_path / "config.json").write_text((SOURCE / "config.json").read_text())
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": AWQ}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(SOURCE / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"says that .* with awq, but none is named \*\.qwe"):
        checkpoints.resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("zeros", "message"),
    [(15, "zero points out of range"), (3, "has zero points, but config.json says sym")],
)
def test_zero_points_that_readers_do_not_agree_on(zeros: int, message: str, tmp_path: Path) -> None:
    folder = quantize_folder(SOURCE, tmp_path / "packed", GPTQ, LAYOUTS["gptq"][1])
    shape = load_file(folder / "model.safetensors")[f"{UP}.qzeros"].shape
    change(folder, qzeros=torch.full(shape, zeros, dtype=torch.int32))
    with pytest.raises(CheckpointError, match=message):
        plan(folder).checkpoint.read(f"{UP}.weight")
