"""A bundle's manifest that is right as far as the reader can tell, and changes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import policies
import pytest
from policies import UNIFORM, changed

from lvlm.core.errors import BundleError
from lvlm.runtime.bundle.graph_ports import FORMS
from lvlm.runtime.bundle.manifest import Manifest, Port
from lvlm.runtime.bundle.reader import read_bundle
from lvlm.runtime.policies.shares import ProfileRow

GRAPHS = ("vision", "prefill", "decode")
PROFILE = (ProfileRow(0.2, (0.3, 0.3, 0.1, 0.1)), ProfileRow(0.5, (0.8, 0.6, 0.4, 0.2)))
FIXED_POINT = changed(UNIFORM, profile=PROFILE)
INTERVAL = changed(policies.INTERVAL, cap=256)


def fit_ports(manifest: Manifest) -> Manifest:
    """With graphs that take and give what the rest of it says."""

    def ports(forms: Any) -> tuple[Port, ...]:
        return tuple(
            Port(name, dtype, tuple("any" if d is None else d for d in dims))
            for name, (dtype, dims) in forms.items()
        )

    graphs = dict(manifest.graphs)
    if manifest.cache_policy is not None and manifest.cache_policy.interval is not None:
        graphs["compact"] = graphs["decode"]
    for name, graph in graphs.items():
        takes, _, gives = FORMS[name](manifest)
        graphs[name] = replace(graph, inputs=ports(takes), outputs=ports(gives))
    return replace(manifest, graphs=graphs)


def change(folder: Path, edit: Callable[[Any], object]) -> None:
    path = folder / "lvlm.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def put(*keys: str | int, value: object) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return edit


def refused(folder: Path, **options: Any) -> str:
    """The one line that ``read_bundle`` refuses the bundle with."""
    with pytest.raises(BundleError) as caught:
        read_bundle(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
