"""The forms of a checkpoint: layouts and schemes are files that discovery finds."""

from __future__ import annotations

from collections.abc import Mapping

from lvlm.core.discovery import discover
from lvlm.core.errors import CheckpointError
from lvlm.export.checkpoint.checkpoint_form import Form, Layout, Scheme, Source

SETTINGS = ("quantization_config", "compression_config")  # the name of the latter is older


def find_forms(found: Source) -> tuple[Form, ...]:
    """Find what makes a plain checkpoint of ``found``; () where it is one. Raises
    CheckpointError."""
    layouts: dict[str, Layout] = discover("lvlm.export.checkpoint.layouts", "LAYOUT")
    for layout in layouts.values():
        if (form := layout.read(found)) is not None:
            return (form,)
    name = next((name for name in SETTINGS if found.config.get(name)), None)
    if name is None:
        return ()
    return (_quantized(found, name),)


def _quantized(found: Source, name: str) -> Form:
    settings = found.config[name]
    schemes: dict[str, Scheme] = discover("lvlm.export.checkpoint.quantized", "SCHEME")
    # An older name of compressed-tensors' settings, which then name no method
    usual = "compressed-tensors" if name == "compression_config" else None
    method = settings.get("quant_method", usual) if isinstance(settings, Mapping) else None
    for scheme in schemes.values():
        if method in scheme.methods:
            return scheme.read(settings, found)
    known = ", ".join(sorted(method for x in schemes.values() for method in x.methods))
    raise CheckpointError(
        f"the checkpoint is quantized with {str(method)[:40]} ({name} in config.json), which is "
        f"not read; read are {known}; export the original weights"
    )
