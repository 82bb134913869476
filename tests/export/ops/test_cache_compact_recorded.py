"""``CacheCompact`` against the caches that the papers' released code made of a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from single_node import feeds, session, single_node_model

from lvlm.export.ops.cache_compact.contract import OP
from lvlm.export.ops.op import OpSample

VECTORS = Path(__file__).parents[2] / "data/caches"
RECORDED = sorted(path.name for path in VECTORS.glob("*.npz"))
MODES = {"elastic": "merge-reference", "prefixkv": "evict"}


def test_there_are_recordings() -> None:
    assert [name.split("_")[0] for name in RECORDED] == ["elastic"] * 3 + ["prefixkv"] * 3


@pytest.mark.parametrize("engine", ["torch", "onnx"])
@pytest.mark.parametrize("name", RECORDED)
def test_prefill(name: str, engine: str) -> None:
    """At the lengths that were kept; the layers of a recording run as rows of one batch."""
    recorded = np.load(VECTORS / name)
    meta = json.loads(str(recorded["meta"]))
    layers = range(meta["layers"])

    def stacked(what: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([recorded[f"{what}_{i}"] for i in layers]))

    expected = [[recorded[f"prefill_{what}_{i}"][0] for i in layers] for what in "kv"]
    kept = [keys.shape[1] for keys in expected[0]]
    importance = stacked("attn").mean(1).sum(1)
    length = torch.full((len(layers),), meta["prompt"])
    inputs = stacked("k"), stacked("v"), importance, length, torch.tensor(kept)
    attributes = {"mode": MODES[meta["method"]], "sinks": meta["start_size"], "recent": 1}
    sample = OpSample(name, (*inputs, torch.arange(max(kept))), attributes)
    if engine == "torch":
        found = [t.numpy() for t in OP(*sample.inputs, **sample.attributes)]
    else:
        found = session(single_node_model(OP, sample)).run(None, feeds(OP, sample))

    assert found[3].tolist() == kept
    for new, wanted in zip(found[:2], expected, strict=True):
        for layer, rows in enumerate(wanted):
            np.testing.assert_allclose(new[layer, :, : kept[layer]], rows, rtol=1e-6, atol=1e-7)
