"""What is installed, by the name that the package index knows."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "lvlm-deploy"


def version() -> str:
    """Of the installed distribution; ``unknown`` where sources are run that are not installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
