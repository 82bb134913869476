"""The installed version, by the name that the package index knows."""

from __future__ import annotations

DISTRIBUTION = "lvlm-deploy"


def version() -> str:
    """Version of the installed distribution; ``unknown`` where sources are run that are not
    installed."""
    from importlib import metadata  # takes a while, which --help has no use for

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
