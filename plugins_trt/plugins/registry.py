"""The plugins there are: every folder of ``plugins_trt`` with a ``plugin.py``."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

from lvlm.plugins_trt.plugins.plugin_plan import Plugin


@cache
def plugins() -> dict[str, Plugin]:
    """Every plugin by the name of its op. Needs Triton, whose functions the plans hold."""
    folders = sorted(file.parent.name for file in Path(__file__).parents[1].glob("*/plugin.py"))
    found = (importlib.import_module(f"lvlm.plugins_trt.{name}.plugin").PLUGIN for name in folders)
    return {plugin.name: plugin for plugin in found}
