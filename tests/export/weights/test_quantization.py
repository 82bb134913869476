"""The quantizer of weights, and mistakes in asking for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlm.core.errors import ParameterError
from lvlm.export import export_cli
from lvlm.export.weights.quantization import WeightQuantization, dequantize, quantize


@given(
    st.sampled_from([4, 8]),
    st.sampled_from([16, 32]),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=examples(40), deadline=None)
def test_a_weight_comes_back_to_within_its_scale(
    bits: int, block: int, blocks: int, outputs: int, seed: int
) -> None:
    how = WeightQuantization(bits, block)
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((blocks * block, outputs), dtype=np.float32)
    weight *= rng.choice([0.0, 1e-3, 1.0, 50.0], (1, outputs))  # a column of zeros, too
    packed, scales = quantize(weight, how)
    assert (packed.dtype, packed.shape) == (np.uint8, (outputs, blocks * block * bits // 8))
    assert (scales.dtype, scales.shape) == (np.float32, (outputs, blocks))
    back = dequantize(packed, scales, how)
    step = np.abs(scales).T.repeat(block, axis=0)
    # Rounded to half a step, but for the largest number on the side that has one step less.
    assert (np.abs(back - weight) <= step * 1.001).all()
    assert (np.abs(back - weight) <= step * 0.501).mean() > 0.9
    assert not back[weight == 0].any()


def test_outputs_with_a_scale_each() -> None:
    """Rounded to half a step everywhere; a column of zeros stays one."""
    weight = np.random.default_rng(0).standard_normal((96, 5), dtype=np.float32)
    weight[:, 2] = 0
    how = WeightQuantization(8, 32, whole=True)
    packed, scales = quantize(weight, how)
    assert (packed.dtype, packed.shape, scales.shape) == (np.uint8, (5, 96), (5, 3))
    assert (scales == scales[:, :1]).all()
    assert (scales[[0, 1, 3, 4]] > 0).all()
    back = dequantize(packed, scales, how)
    assert (np.abs(back - weight) <= scales[:, 0] * 0.501).all()
    assert not back[:, 2].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_bytes_are_what_both_readers_take(bits: int) -> None:
    """DequantizeLinear of standard ONNX, and MatMulNBits, by ONNX Runtime."""
    how, rng = WeightQuantization(bits, 16), np.random.default_rng(0)
    weight = rng.standard_normal((48, 10), dtype=np.float32)
    x = rng.standard_normal((3, 48), dtype=np.float32)
    packed, scales = quantize(weight, how)
    kind = onnx.TensorProto.UINT4 if bits == 4 else onnx.TensorProto.UINT8
    zero = np.full(30 * bits // 8, 0x88 if bits == 4 else 0x80, np.uint8)
    make = onnx.helper
    nodes = [
        make.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=1, block_size=16),
        make.make_node("Gemm", ["x", "d"], ["spread"], transB=1),
        make.make_node(
            "MatMulNBits", ["x", "b", "s"], ["blocks"], domain="com.microsoft",
            K=48, N=10, bits=bits, block_size=16, accuracy_level=1,
        ),
    ]  # fmt: skip
    info = make.make_tensor_value_info
    graph = make.make_graph(
        nodes,
        "g",
        [info("x", onnx.TensorProto.FLOAT, [3, 48])],
        [info(name, onnx.TensorProto.FLOAT, [3, 10]) for name in ("spread", "blocks")],
        [
            make.make_tensor("w", kind, [10, 48], packed.tobytes(), raw=True),
            make.make_tensor("z", kind, [10, 3], zero.tobytes(), raw=True),
            onnx.numpy_helper.from_array(scales, "s"),
            onnx.numpy_helper.from_array(packed.reshape(how.blocks(10, 48)), "b"),
        ],
    )
    opsets = [make.make_opsetid("", 24), make.make_opsetid("com.microsoft", 1)]
    model = make.make_model(graph, opset_imports=opsets, ir_version=11)
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    wanted = x @ dequantize(packed, scales, how)
    for result in session.run(None, {"x": x}):
        np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("digits-llava", "--block-size 64", "--block-size is for quantized weights; add --weights"),
        (
            "digits-llava",
            "--weights int4 --block-size 48",
            "--block-size 48: give one of 16, 32, 64",
        ),
        (
            "digits-llava",
            "--weights int4 --block-size 128",
            "192 inputs, which blocks of 128 do not",
        ),
        ("llava:llama-gqa-clip", "--weights int8", "do not divide; give --block-size 16"),
        ("digits-llava", "--weights int4 --dtype bf16", "--weights int4 goes with --dtype fp32 or"),
        (
            "digits-llava",
            "--cache fp16 --dtype bf16",
            "--cache fp16 goes with --dtype fp32 or fp16",
        ),
        ("digits-llava", "--calibrate", "--calibrate is for weights of 4 bits; add --weights int4"),
        ("digits-llava", "--weights int8 --calibrate", "--calibrate is for weights of 4 bits"),
        ("digits-llava", "--weights int4 --calibrate no.jsonl", "samples no.jsonl do not exist"),
        ("digits-llava", "--weights int2", "invalid choice: 'int2'"),
        (
            "digits-llava",
            "--weights int4 --target jetson-orin-jp62",
            "jetson-orin-jp62 does not take int4 weights; export with --weights int8 --block-size",
        ),
        (
            "digits-llava",
            "--weights int8 --target trt-rtx",
            "with one scale for each output only, not blocks of 32; export with --block-size all",
        ),
        ("digits-llava", "--weights int4 --block-size all", "--block-size all is for --weights"),
        (
            "digits-llava",
            "--dtype fp32 --cache fp16 --target trt-rtx",
            "target trt-rtx does not take --cache fp16",
        ),
    ],
)
def test_mistakes_get_one_line(
    name: str,
    flags: str,
    message: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = checkpoint(name), tmp_path / "out"
    capsys.readouterr()
    try:
        code: Any = export_cli.main(["-m", str(folder), "-o", str(out), *flags.split()])
    except SystemExit as exit_:
        code = exit_.code
    said = capsys.readouterr().err
    assert code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1 or "usage:" in said
    assert not out.exists()


def test_a_weight_that_no_block_size_divides() -> None:
    with pytest.raises(ParameterError, match=r"100 inputs.*leave --weights out"):
        WeightQuantization(4, 32).check("w", 100)


def test_dry_run_says_what_is_narrow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["-m", "tiny-llava", "-o", str(tmp_path / "out"), "--weights", "int4", "--dry-run"]
    assert export_cli.main([*flags, "--dtype", "fp32", "--cache", "fp16", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["weights"] == {"bits": 4, "block": 32}
    assert data["calibration"] is None
    plain = data["disk_bytes"], data["peak_memory_estimate_bytes"], data["seconds_estimate"]
    assert (data["dtype"], data["cache_dtype"]) == ("float32", "float16")
    assert export_cli.main([*flags, "--block-size", "16"]) == 0
    table = capsys.readouterr().out
    assert "as float16, 57 linear layers quantized to int4" in table
    assert "GPTQ" not in table
    assert export_cli.main([*flags, "--dtype", "fp32", "--calibrate", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["calibration"] == {"method": "gptq", "file": None, "samples": 8}
    assert data["disk_bytes"] > plain[0]
    assert data["peak_memory_estimate_bytes"] > plain[1]
    assert data["seconds_estimate"] > plain[2]
    assert export_cli.main([*flags, "--calibrate"]) == 0
    assert "by GPTQ on 8 built-in samples" in " ".join(capsys.readouterr().out.split())
