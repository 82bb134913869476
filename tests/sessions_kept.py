"""Sessions of ONNX Runtime that tests share: a graph that was loaded is not loaded again.

To make a session takes longer than most tests run one, and nothing that a call does stays in it.
Bytes count, not names: a copy of a graph beside the same weights is the same graph. Tests about
loading itself ask for the fixture ``own_sessions``.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

import pytest

from lvlm.runtime.backends.ort.sessions import check_ports, types
from lvlm.runtime.backends.ort.shared_sessions import SharedSession, SharedWeights
from lvlm.runtime.bundle.manifest import Graph, Manifest

MOST = 64  # sessions that a process keeps
Kept = OrderedDict[Hashable, SharedSession]


def keep_sessions(patch: pytest.MonkeyPatch) -> None:
    """While ``patch`` lasts, sessions of equal graphs and weights are one."""
    kept: Kept = OrderedDict()
    load = SharedWeights.session

    def session(
        self: SharedWeights, folder: Path, manifest: Manifest, graph: Graph, file: Path
    ) -> SharedSession:
        key = _key(self, folder, manifest, graph, file)
        if key is None:
            return load(self, folder, manifest, graph, file)
        if key not in kept:
            kept[key] = load(self, folder, manifest, graph, file)
            if len(kept) > MOST:
                kept.popitem(last=False)
        kept.move_to_end(key)
        there = kept[key]
        inputs, outputs = there.library.ports(there.handle)
        check_ports(graph, inputs, outputs)
        kinds = types(graph, outputs)
        return SharedSession(there.owner, there.handle, kinds, outputs, there.gated)

    patch.setattr(SharedWeights, "session", session)


def _key(
    owner: SharedWeights, folder: Path, manifest: Manifest, graph: Graph, file: Path
) -> Hashable | None:
    """What makes a session what it is; None: files are missing, which is for loading to say."""
    weights = {name: manifest.weights[name] for name in graph.weights}
    files = sorted({weight.file for weight in weights.values()})
    try:
        places = [(folder / name).stat() for name in files]
        content = hashlib.sha256(file.read_bytes()).digest()
    except OSError:
        return None
    versions = tuple((s.st_dev, s.st_ino, s.st_mtime_ns, s.st_size) for s in places)
    placed = tuple((name, repr(weight)) for name, weight in weights.items())
    return content, versions, placed, owner.threads, owner.kernels
