"""Has this machine what an export needs?"""

from __future__ import annotations

import shutil

from lvlm.core.errors import ExportError
from lvlm.core.progress import size
from lvlm.export.checkpoint.plain_copy import copied_bytes
from lvlm.export.estimates import check_memory
from lvlm.export.export_plan import ExportPlan


def disk(plan: ExportPlan) -> int:
    """Bytes that the export writes at most."""
    return plan.weight_bytes + plan.angle_bytes + 50_000_000 + plain_bytes(plan)


def plain_bytes(plan: ExportPlan) -> int:
    """Of the copy that the bundle is compared, and a profile measured, with; 0 where the
    checkpoint itself does."""
    if not (plan.options.validate or plan.measured):
        return 0
    return copied_bytes(plan.checkpoint, plan.dtype)


def check_machine(plan: ExportPlan) -> None:
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
