"""Quantized weights in the form that TensorRT keeps packed: signed numbers without zero points.

A bundle's number u stands for (u - z) * s, with z mostly in the middle, 8 or 128. The signed number
u - 8 has the same bits but for the highest. Where a zero point is another one, or a scale is below
zero and the target takes no such scale, a constant is left over for every block of an output:

    (u - z) * s = q * |s| + c     with q = u - 8 and c = (8 - z) * s,
                                  for s < 0 with q = 7 - u and c = (z - 7) * |s|

and a MatMul has c times the sums of its rows' blocks added: a small MatMul with [K / block, N].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lvlm.core.errors import ExportError
from lvlm.export.targets.description import Description, SignedWeights
from lvlm.export.targets.passes.ort_fusions import take_place
from lvlm.export.targets.passes.quantized_linears import extents, readable, spread_of, stored

SIGNED = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
FLIP = {4: 0x88, 8: 0x80}  # the highest bit of every number of a byte


@dataclass(frozen=True)
class QuantizedLinear:
    """The operands of a DequantizeLinear as they are stored, [N,K] and [N, K / block], and what is
    made of them. ``positive``: no scale may be below zero, or zero; ``whole``: all blocks of an
    output share a scale, and become one."""

    numbers: ir.ExternalTensor
    scales: ir.ExternalTensor
    zero_points: ir.ExternalTensor
    positive: bool
    whole: bool

    @property
    def bits(self) -> int:
        return self.numbers.dtype.bitwidth

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Scales, and zero points int16 counted from the middle."""
        middle = 1 << self.bits - 1
        return self.scales.numpy(), self.zero_points.numpy().astype(np.int16) - middle

    def signed_bytes(self) -> np.ndarray:
        """uint8 [N, K * bits / 8]: the signed numbers, of negative blocks their complements."""
        scales, _ = self.read()
        packed = np.frombuffer(self.numbers.tobytes(), np.uint8).reshape(*scales.shape, -1)
        flip = np.full(scales.shape, FLIP[self.bits], np.uint8)
        if self.positive:
            flip[scales < 0] ^= 0xFF
        signed: np.ndarray = packed ^ flip[..., None]
        if self.positive:
            signed[scales == 0] = 0
        return signed.reshape(len(scales), -1)

    def signed_scales(self) -> np.ndarray:
        """[N, K / block], or [N] of whole outputs."""
        scales, _ = self.read()
        if self.positive:
            scales = np.where(scales == 0, 1, abs(scales)).astype(scales.dtype)
        return scales[:, 0] if self.whole else scales

    def left_over(self) -> np.ndarray:
        """The constants [K / block, N], or [1,N] of whole outputs."""
        scales, points = self.read()
        wide = scales.astype(np.float32)
        constants = -points * wide
        if self.positive:
            constants = np.where(wide < 0, (points + 1) * abs(wide), constants)
        return (constants[:, :1] if self.whole else constants).T.astype(scales.dtype)

    @property
    def leaves_over(self) -> bool:
        return bool(self.left_over().any())


def check_quantized_weights(model: ir.Model, target: Description) -> None:
    """Raise ExportError for a quantized weight that ``target`` does not take, by its name."""
    for spread in {spread: None for node in model.graph if (spread := spread_of(node)) is not None}:
        _taken(spread, target)


def use_signed_weights(model: ir.Model, target: Description) -> int:
    """Give every MatMul with a quantized weight a signed one; how many weights.

    Raises ExportError for what the target does not take, by its name.
    """
    matmuls: dict[ir.Node, list[ir.Node]] = {}
    for node in model.graph:
        if (spread := spread_of(node)) is not None:
            matmuls.setdefault(spread, []).append(node)
    sums: dict[tuple[ir.Value, int], ir.Value] = {}
    for spread, nodes in matmuls.items():
        linear = _taken(spread, target)
        left_over = _exchange(model, spread, linear)
        for node in nodes if left_over is not None else ():
            assert left_over is not None
            _add(model, node, left_over, sums)
    for name, value in list(model.graph.initializers.items()):
        if matmuls and not list(value.uses()):  # parsers read them, and know no unsigned ones
            del model.graph.initializers[name]
    return len(matmuls)


def _taken(spread: ir.Node, target: Description) -> QuantizedLinear:
    """The inputs of ``spread``, as ``target`` takes them."""
    numbers, scales, zeros = (readable(stored(value)) for value in spread.inputs[:3])
    bits, block = numbers.dtype.bitwidth, extents(numbers)[1] // extents(scales)[1]
    signed = target.signed or SignedWeights({})
    whole = signed.whole(bits, block)
    linear = QuantizedLinear(numbers, scales, zeros, signed.positive(bits), whole)
    alike = whole and all((x == x[:, :1]).all() for x in linear.read())
    if (refusal := target.refusal(bits, block, whole=alike)) is not None:
        raise ExportError(f"{refusal} ({numbers.name})")
    return linear


def _exchange(model: ir.Model, spread: ir.Node, linear: QuantizedLinear) -> ir.Value | None:
    """A DequantizeLinear of signed numbers in ``spread``'s place; the constants that are left over,
    if any are."""
    name, dtype = linear.numbers.name, linear.scales.dtype
    outputs, blocks = extents(linear.scales)
    signed = _initializer(
        model, f"{name}.signed", SIGNED[linear.bits], linear.numbers.shape, linear.signed_bytes
    )
    scale = spread.inputs[1]
    if linear.positive or linear.whole:
        shape = ir.Shape([outputs] if linear.whole else [outputs, blocks])
        of = f"{linear.scales.name}.signed"
        scale = _initializer(model, of, dtype, shape, linear.signed_scales)
    block = extents(linear.numbers)[1] // blocks
    attributes = {"axis": 0} if linear.whole else {"axis": 1, "block_size": block}
    node = ir.node("DequantizeLinear", [signed, scale], attributes=attributes)
    model.graph.insert_before(spread, node)
    take_place(spread.outputs[0], node.outputs[0])
    model.graph.remove(spread, safe=True)
    if not linear.leaves_over:
        return None
    shape = ir.Shape([1 if linear.whole else blocks, outputs])
    return _initializer(model, f"{name}.left_over", dtype, shape, linear.left_over)


def _initializer(
    model: ir.Model,
    name: str,
    dtype: ir.DataType,
    shape: ir.Shape,
    compute: Callable[[], np.ndarray],
) -> ir.Value:
    """An initializer that is computed when it is written: one is in memory at a time."""

    def tensor() -> ir.TensorProtocol:
        found = compute()
        if dtype == ir.DataType.INT4:
            return ir.PackedTensor(found.reshape(-1), dtype, shape=shape, name=name)
        return ir.Tensor(found.view(dtype.numpy()).reshape(shape.numpy()), dtype, name=name)

    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
    value.const_value = ir.LazyTensor(tensor, dtype, shape, name=name)
    model.graph.initializers[name] = value
    return value


def _add(
    model: ir.Model,
    matmul: ir.Node,
    constants: ir.Value,
    sums: dict[tuple[ir.Value, int], ir.Value],
) -> None:
    """Add the sums of blocks of a MatMul's rows, times ``constants``, to it."""
    rows, result = matmul.inputs[0], matmul.outputs[0]
    if rows is None or rows.shape is None or constants.shape is None:
        raise ExportError(f"the rows that {matmul.name} multiplies have no known shape")
    groups = int(constants.shape[0])  # type: ignore[arg-type]
    if (rows, groups) not in sums:
        rank = len(rows.shape)
        form = ir.node("Constant", [], attributes={"value_ints": [0] * (rank - 1) + [groups, -1]})
        axis = ir.node("Constant", [], attributes={"value_ints": [rank]})
        blocks = ir.node("Reshape", [rows, form.outputs[0]])
        total = ir.node(
            "ReduceSum", [blocks.outputs[0], axis.outputs[0]], attributes={"keepdims": 0}
        )
        _name(rows, groups, form=form, axis=axis, blocks=blocks, sums=total)
        total.outputs[0].shape = ir.Shape([*rows.shape[:-1], groups])
        total.outputs[0].type = rows.type
        model.graph.insert_before(matmul, [form, axis, blocks, total])
        sums[rows, groups] = total.outputs[0]
    small = ir.node("MatMul", [sums[rows, groups], constants])
    small.outputs[0].name = f"{result.name}_left_over"
    small.outputs[0].shape, small.outputs[0].type = result.shape, result.type
    whole = ir.node("Add", [result, small.outputs[0]])
    model.graph.insert_after(matmul, [small, whole])
    take_place(result, whole.outputs[0])
    whole.replace_input_with(0, result)
    result.shape, result.type = whole.outputs[0].shape, whole.outputs[0].type


def _name(rows: ir.Value, groups: int, **nodes: ir.Node) -> None:
    for what, node in nodes.items():
        node.outputs[0].name = f"{rows.name}_{what}_{groups}"
