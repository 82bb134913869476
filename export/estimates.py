"""Estimates of the memory that an export takes, and of how much there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lvlm.core.errors import ExportError
from lvlm.core.progress import size
from lvlm.export.export_options import ExportOptions
from lvlm.export.targets.description import LARGE

LIBRARIES = 550_000_000  # torch and what belongs to it, and traced graphs
RUNNING = 1_000_000_000  # bytes beside the weights while a prompt is run
ANGLES = 13  # times the rotary angles of every position, while they are computed and written
CGROUP = Path("/sys/fs/cgroup")  # of the container, where there is one


def peak_memory(
    options: ExportOptions,
    *,
    weight_bytes: int,
    largest: int,
    dtype: torch.dtype,
    validate: bool,
    angles: int = 0,
    calibrating: int = 0,
) -> int:
    """Most resident memory of an export, in bytes; the page cache is not counted.

    Libraries and traced graphs (docs/notes/measurements.md), and two copies of the largest tensor,
    with quantization another two in fp32; with validation, the measuring of a profile or the
    calibration of weights also ``running_memory``.

    Args:
        weight_bytes: of the bundle.
        largest: elements of the largest parameter.
        angles: bytes of the rotary angles of every position.
        calibrating: bytes that the rounding of weights on samples takes beside the running model.
    """
    base = LIBRARIES + 2 * largest * (dtype.itemsize + (4 if options.weights else 0))
    base += ANGLES * angles
    wanted = options.recipe.calibration()
    if not (validate or calibrating) and (wanted is None or wanted.file is not None):
        return base
    copies = any(t.flavour == "openvino" for t in options.targets) and weight_bytes <= LARGE
    graphs = 4 * validate  # prefill, decode and extend, and one that is being packed
    running = running_memory(largest) + calibrating
    return max(base, running) + graphs * weight_bytes * copies


def running_memory(largest: int) -> int:
    """Bytes for the checkpoint to answer in torch, its largest parameter of ``largest`` elements.

    The weights stay in their files; one of them is made fp32 at a time, at most twice. Small ones
    and what passes through the layers are counted as RUNNING.
    """
    return LIBRARIES + RUNNING + 8 * largest


@dataclass(frozen=True)
class ExportWork:
    """The work of an export.

    Attributes:
        graphs: how many are traced; ``blocks``: of the language model, in each.
        dense_bytes: of all weights, none of them quantized.
        copied: a plain copy is written first.
        quantized: weights are rounded.
        runs: how often the model reads prompts on the CPU: to measure, and to compare.
        calibrated: weights are rounded on samples; their time is a guess, for some thousand tokens.
    """

    graphs: int
    blocks: int
    dense_bytes: int
    copied: bool
    quantized: bool
    runs: int
    calibrated: bool = False

    @property
    def seconds(self) -> float:
        """About how long it takes on two CPU cores, from figures of tiny-llava and of 7B shapes
        (docs/notes/measurements.md, export-speed.md): tracing by graphs and blocks, the rest by
        bytes. Downloads come before."""
        gigabytes = self.dense_bytes / 1e9
        passes = 1 + self.copied + self.quantized
        rounding = self.calibrated * (10 + 200 * gigabytes)
        tracing = self.graphs * (2 + 0.13 * self.blocks)
        return 5 + tracing + rounding + 6 * gigabytes * passes + self.runs * (10 + 32 * gigabytes)


def check_memory(what: str, needed: int, others: Mapping[str, int] | None = None) -> None:
    """ExportError where ``what`` needs more bytes than are free; of ``others``, advice -> bytes, it
    gives what would fit."""
    memory = free_memory()
    if memory is None or needed <= memory:
        return
    helps = ["close other programs or use a machine with more memory"]
    helps += [advice for advice, other in (others or {}).items() if other <= memory]
    raise ExportError(
        f"{what} needs about {size(needed)} of memory, {size(memory)} are free; "
        f"{', or '.join(helps)}"
    )


def free_memory() -> int | None:
    """Bytes that processes may still take, page cache and swap included; None where the system
    does not say. The least of what the machine and the container have."""
    found = [x for x in (_machine_memory(), _container_memory()) if x is not None]
    return min(found, default=None)


def _machine_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return values["MemAvailable"] + values.get("SwapFree", 0)
    except (OSError, ValueError, LookupError):
        return None


def _container_memory() -> int | None:
    """The memory limit of control groups, version 2 or 1."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            whole, taken = (int((CGROUP / name).read_text()) for name in (limit, used))
            rows = (CGROUP / limit).with_name("memory.stat").read_text().splitlines()
            cached = {row.split()[0]: int(row.split()[1]) for row in rows}.get("inactive_file", 0)
            return max(0, whole - taken + cached)
        except (OSError, ValueError, LookupError):  # "max": without a limit
            continue
    return None
