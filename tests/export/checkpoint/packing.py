"""Quantized checkpoints of every layout, written by plain loops over one number after the other,
and the dense weights that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the eight numbers of a word, where each goes


@dataclass(frozen=True)
class Rounded:
    """A weight [N,K]: numbers [N,K], scales and zero points [N,G]."""

    numbers: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    def dense(self, group_of: np.ndarray | None = None) -> np.ndarray:
        """What it stands for, by loops; ``group_of`` [K]: the group of each input."""
        outputs, inputs = self.numbers.shape
        run = inputs // self.scales.shape[1]
        found = np.zeros((outputs, inputs), np.float32)
        for k in range(inputs):
            group = k // run if group_of is None else group_of[k]
            away = self.numbers[:, k].astype(np.float32) - self.zeros[:, group]
            found[:, k] = away * self.scales[:, group].astype(np.float32)
        return found


def round_weight(
    weight: np.ndarray, bits: int, group: int, *, symmetric: bool, scales: Any = np.float16
) -> Rounded:
    """To the nearest of 2**bits numbers, group by group."""
    outputs, inputs = weight.shape
    runs = weight.reshape(outputs, inputs // group, group).astype(np.float64)
    top, half = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        step = np.abs(runs).max(-1) / (half - 1)
        zeros = np.full(step.shape, half)
    else:
        low, high = np.minimum(runs.min(-1), 0), np.maximum(runs.max(-1), 0)
        step = (high - low) / top
        zeros = np.clip(np.round(-low / step), 1, top)
    step = step.astype(scales)
    numbers = np.round(runs / step[..., None].astype(np.float64)) + zeros[..., None]
    numbers = np.clip(numbers, 0, top).reshape(outputs, inputs)
    return Rounded(numbers.astype(np.int64), step, zeros.astype(np.int64))


def words(rows: np.ndarray, bits: int, places: tuple[int, ...] | None = None) -> torch.Tensor:
    """Numbers [R,C] -> int32 [R, C * bits / 32], each at its place in a word."""
    count = 32 // bits
    found = np.zeros((rows.shape[0], rows.shape[1] // count), np.uint32)
    for column in range(rows.shape[1]):
        word, at = divmod(column, count)
        at = at if places is None else places[at]
        found[:, word] |= rows[:, column].astype(np.uint32) << np.uint32(bits * at)
    return torch.from_numpy(found.view(np.int32).copy())


def as_awq(name: str, one: Rounded) -> Tensors:
    return {
        f"{name}.qweight": words(one.numbers.T, 4, AWQ_PLACES),
        f"{name}.qzeros": words(one.zeros.T, 4, AWQ_PLACES),
        f"{name}.scales": torch.from_numpy(one.scales.T.copy()),
    }


def as_gptq(
    name: str, one: Rounded, bits: int = 4, less: int = 1, order: np.ndarray | None = None
) -> Tensors:
    inputs = one.numbers.shape[1]
    group = np.arange(inputs) // (inputs // one.scales.shape[1]) if order is None else order
    return {
        f"{name}.qweight": words(one.numbers, bits).t().contiguous(),
        f"{name}.qzeros": words(one.zeros.T - less, bits),
        f"{name}.scales": torch.from_numpy(one.scales.T.copy()),
        f"{name}.g_idx": torch.from_numpy(group.astype(np.int32)),
    }


def as_compressed(name: str, one: Rounded, bits: int = 4, *, symmetric: bool = True) -> Tensors:
    found = {
        f"{name}.weight_packed": words(one.numbers, bits),
        f"{name}.weight_scale": torch.from_numpy(one.scales.copy()),
        f"{name}.weight_shape": torch.tensor(one.numbers.shape),
    }
    if not symmetric:
        zeros = words(one.zeros.T, bits).t().contiguous()
        found[f"{name}.weight_zero_point"] = zeros
    return found


def compressed_settings(
    bits: int, group: int, *, symmetric: bool, form: str = "pack-quantized", **more: Any
) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group"}
    scheme = {"weights": weights | {"group_size": group}, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": scheme | more},
        "ignore": ["lm_head"],
    }


def is_linear(name: str, block: str = "") -> bool:
    """A linear layer of the language model, or of one block of it: not the head."""
    return f"language_model.model.layers.{block}" in name and name.endswith("_proj.weight")


def quantize_folder(
    source: Path,
    folder: Path,
    settings: Mapping[str, Any],
    write: Callable[[str, np.ndarray], tuple[Tensors, np.ndarray]],
    block: str = "0.",
) -> Path:
    """A checkpoint like ``source`` with linear layers of one block, "" for all, as ``write`` gives
    them by layer and weight [N,K]; beside it, in ``FOLDER-dense``, the one that it stands for."""
    weights, packed, dense = load_file(source / "model.safetensors"), {}, {}
    for name, weight in weights.items():
        if is_linear(name, block):
            made, plain = write(name.removesuffix(".weight"), weight.float().numpy())
            packed |= made
            dense[name] = torch.from_numpy(plain).contiguous()
        else:
            packed[name] = dense[name] = weight
    twin = folder.with_name(f"{folder.name}-dense")
    for into, tensors in ((folder, packed), (twin, dense)):
        shutil.copytree(source, into)
        save_file(tensors, into / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = dict(settings)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
