"""Python packages that exports are made with: whether they are there, what they say and read."""

from __future__ import annotations

import os
from collections.abc import Sequence

EXPORTING = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors")


def check_installed(packages: Sequence[str], extra: str, otherwise: str = "") -> None:
    """Raises ExportError that names what is missing of ``packages`` and the extra that has it."""
    from importlib.util import find_spec

    from lvlm.core.errors import ExportError
    from lvlm.core.installing import install

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ExportError(f"{', '.join(missing)} not installed; {install(extra)}{otherwise}")


def set_environment(verbose: bool) -> None:
    """Set what torch and transformers read when they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if verbose else "1")
    # Torch's threads wait asleep: of a small model, most of the processor's time was spinning
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Torch asks for large pages: a weight in memory page by page took longer than transposing it
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def set_logging(verbose: bool) -> None:
    """Say all that they say, or their errors only."""
    import logging
    import warnings

    if verbose:
        logging.basicConfig(level=logging.INFO)
        logging.getLogger("lvlm").setLevel(logging.DEBUG)
        return
    warnings.simplefilter("ignore")
    for name in ("torch", "transformers", "onnxscript", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
