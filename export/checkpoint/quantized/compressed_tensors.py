"""compressed-tensors, as llm-compressor and vLLM's users write it: packed int4 and int8, int8 and
fp8 in tensors of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lvlm.core.errors import CheckpointError
from lvlm.export.checkpoint.checkpoint_form import DenseTensor, Form, Read, Source
from lvlm.export.checkpoint.quantized.fp8 import scaled
from lvlm.export.checkpoint.quantized.parts.bit_fields import fields_of
from lvlm.export.checkpoint.quantized.parts.module_tensors import (
    make_form,
    misshapen,
    modules_with,
    part,
    refuse,
)
from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor, Unpacked

METHOD = "compressed-tensors"
PACKED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
PLAIN = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")


class CompressedTensors:
    """See Scheme. weight_packed [N,K * bits / 32] int32 or weight [N,K], weight_scale [N,G]."""

    name = METHOD
    methods = (METHOD,)

    def read(self, settings: Mapping[str, Any], found: Source) -> Form:
        kind, weights, activations = _schemes(settings)
        if kind not in FORMATS:
            known = ", ".join(FORMATS)
            raise refuse(METHOD, f"format {str(kind)[:40]}", f"{known} are supported")
        unkept = "activations are quantized, too, which a bundle does not do" if activations else ""
        if kind != "pack-quantized":
            return self._plain(found, weights, unkept)
        modules = modules_with(found, "weight_packed", METHOD)
        if any(f"{module}.weight_g_idx" in found.tensors for module in modules):
            raise refuse(METHOD, "in act-order (actorder)", "export the original weights")
        made = {module: _packed(found, module, weights) for module in modules}
        return make_form(METHOD, found, made, PACKED, unkept)

    def _plain(self, found: Source, weights: Mapping[str, Any], unkept: str) -> Form:
        made: dict[str, DenseTensor] = {}
        block = weights.get("block_structure")
        for module in modules_with(found, "weight_scale", METHOD):
            if f"{module}.weight_zero_point" in found.tensors and not weights.get("symmetric"):
                raise refuse(METHOD, "with zero points", "export the original weights")
            sizes = tuple(block) if isinstance(block, list | tuple) else None
            made[module] = scaled(found, module, "weight_scale", sizes)
        kind = "fp8" if weights.get("type") == "float" else f"int{weights.get('num_bits')}"
        unkept = unkept or f"{kind} in tensors of their own is no form of a bundle"
        return make_form(f"{METHOD}, {kind} ({len(made)} layers)", found, made, PLAIN, unkept)


def _schemes(settings: Mapping[str, Any]) -> tuple[object, Mapping[str, Any], bool]:
    """Format, how weights are quantized, and whether activations are."""
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise refuse(METHOD, "without config_groups", "is config.json complete?")
    found = [_section(group) for group in groups.values()]
    weights = [_section(group.get("weights")) for group in found]
    ways = [(x.get("type"), x.get("num_bits"), bool(x.get("symmetric", True))) for x in weights]
    kinds = {group.get("format") or settings.get("format") for group in found}
    if len(kinds) != 1 or len(set(ways)) != 1:
        raise refuse(METHOD, "in several ways at once", "export the original weights")
    return kinds.pop(), weights[0], any(group.get("input_activations") for group in found)


def _section(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _packed(found: Source, module: str, weights: Mapping[str, Any]) -> PackedTensor:
    bits, symmetric = weights.get("num_bits"), bool(weights.get("symmetric", True))
    if weights.get("type", "int") != "int" or bits not in (4, 8):
        what = f"{weights.get('type')} of {str(bits)[:20]} bits"
        raise refuse(METHOD, what, "int of 4 and 8 bits are supported")
    outputs, words = part(found, module, "weight_packed").shape
    scales = part(found, module, "weight_scale").shape
    inputs, groups = words * 32 // bits, scales[1]
    if scales[0] != outputs:
        raise misshapen(found, module, "weight_scale")
    if not symmetric and part(found, module, "weight_zero_point").shape != (
        -(-outputs * bits // 32),
        groups,
    ):
        raise misshapen(found, module, "weight_zero_point")

    def unpack(read: Read) -> Unpacked:
        if f"{module}.weight_shape" in found.tensors:
            said = read(f"{module}.weight_shape").tolist()
            if said != [outputs, inputs]:
                raise CheckpointError(
                    f"{found.source}: {module}.weight_shape says {said}, which its words do not "
                    "fill; export the original weights with --weights int4"
                )
        zeros = None
        if not symmetric:
            zeros = fields_of(read(f"{module}.weight_zero_point"), bits, axis=0)[:outputs]
        numbers = fields_of(read(f"{module}.weight_packed"), bits, axis=1)
        return Unpacked(numbers, read(f"{module}.weight_scale").float(), zeros)

    return PackedTensor((outputs, inputs), bits, groups, symmetric, unpack)


SCHEME = CompressedTensors()
