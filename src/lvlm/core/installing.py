"""Optional packages, and the commands that install this one with its extras: one place for what
every message says.

Nothing is published on a package index, so a name alone cannot be installed: the command names what
this installation came from, a checkout or a wheel, where that is still there.
"""

from __future__ import annotations

import importlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lvlm.core.errors import BackendError

DISTRIBUTION = "lvlm-deploy"


def install(*extras: str) -> str:
    """The command that adds ``extras``, such as ``pip install "/home/me/lvlm[cuda]"``; from
    another origin than a local one ``pip install ".[cuda]"``, to be run in a checkout."""
    origin = _origin()
    wanted = ",".join(extras)
    if origin is None:
        return f'pip install ".[{wanted}]" in a checkout of {DISTRIBUTION}'
    return f'pip install "{origin}[{wanted}]"'


def require(module: str, mend: str) -> Any:
    """Import an optional package; BackendError says what ``mend`` is where it cannot be."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library that it loads
        reason = str(error).partition("\n")[0]
        raise BackendError(f"{module} cannot be imported ({reason}); {mend}") from None


def _origin() -> Path | None:
    """The checkout or wheel that pip installed (its record, PEP 610), if it is still there."""
    try:
        record = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
        parts = urlsplit(json.loads(record or "{}").get("url", ""))
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        return None
    path = Path(unquote(parts.path))
    return path if parts.scheme == "file" and path.exists() else None
