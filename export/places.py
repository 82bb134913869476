"""Checks of the folder a bundle is written to, before torch is loaded."""

from __future__ import annotations

from pathlib import Path

from lvlm.core.errors import ExportError
from lvlm.core.output import check_place


def check_output(output: Path) -> None:
    """ExportError where no bundle can be written at ``output``."""
    try:
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except (OSError, ValueError) as error:  # a name too long, a folder of somebody else
        reason = getattr(error, "strerror", None) or error
        raise ExportError(f"-o {str(output)[:80]} cannot be used: {reason}") from None
    if taken:
        raise ExportError(f"{output} exists and is not empty; give another -o or remove it")
    check_place("-o", output, ExportError)
