"""What an export needs of the machine, and whether the machine has it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lvlm.export.progress import size
from lvlm.runtime.errors import ExportError

if TYPE_CHECKING:
    from lvlm.export.plan import Options, Plan

LIBRARIES = 550_000_000  # torch and what belongs to it, and traced graphs
CGROUP = Path("/sys/fs/cgroup")  # of the container, where there is one


def peak_memory(
    options: Options,
    *,
    weight_bytes: int,
    largest: int,
    parameters: int,
    dtype: torch.dtype,
    validate: bool,
) -> int:
    """Most resident memory of an export, in bytes; the page cache is not counted.

    Libraries and traced graphs (docs/measurements.md), and two copies of the largest tensor, with
    quantization another two in fp32. Validation also loads the model in fp32 and the bundle; a
    profile is measured on the model in fp32.

    Args:
        weight_bytes: of the bundle.
        largest: elements of the largest parameter.
        parameters: elements of all.
    """
    base = LIBRARIES + 2 * largest * (dtype.itemsize + (4 if options.weights else 0))
    wanted = options.recipe.calibration()
    if validate:
        return base + 4 * parameters + 3 * weight_bytes
    return base + (4 * parameters if wanted is not None and wanted.file is None else 0)


def disk(plan: Plan) -> int:
    """Bytes that the export writes at most, its temporary files included."""
    twin = 2 * plan.weight_bytes if plan.options.validate and plan.dtype == torch.bfloat16 else 0
    return plan.weight_bytes + twin + 50_000_000


def check_machine(plan: Plan) -> None:
    """ExportError, with what helps, where disk or memory are too small for the export."""
    output = plan.options.output.absolute()
    free = shutil.disk_usage(output.parent).free
    if free < disk(plan):
        raise ExportError(
            f"the bundle needs {size(disk(plan))}, the disk has {size(free)} free; "
            "free some or give -o on another disk"
        )
    check_memory(
        "the export",
        plan.peak_bytes,
        {f"give --no-validate (about {size(plan.unvalidated_bytes)})": plan.unvalidated_bytes},
    )


def check_memory(what: str, needed: int, others: Mapping[str, int] | None = None) -> None:
    """ExportError where ``what`` needs more bytes than are free; of ``others``, advice -> bytes, it
    gives what would fit."""
    memory = free_memory()
    if memory is None or needed <= memory:
        return
    helps = ["close other programs or use a machine with more memory"]
    helps += [advice for advice, least in (others or {}).items() if least <= memory]
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
    """Of control groups, version 2 or 1."""
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
