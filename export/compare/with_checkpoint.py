"""A finished bundle and its checkpoint, compared as an export compares them; time and memory."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path

from lvlm.core.discovery import discover
from lvlm.core.errors import ParameterError
from lvlm.export.export_options import CACHES, DTYPES, ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.recipes.recipe import Recipe, parse_settings
from lvlm.export.verify import validation
from lvlm.export.verify.checks import table
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.bundle.reader import read_bundle


def compare(bundle: Path, model: str) -> int:
    """The exit status of ``lvlm-compare checkpoint``. Raises ValidationError if they differ, and
    ParameterError for a bundle whose weights an export alone can compare."""
    manifest = read_bundle(bundle, "none")
    policy = manifest.cache_policy
    made = manifest.quantization is not None or manifest.model.get("forms")
    if made or (policy is not None and policy.budget.profiled):
        raise ParameterError(
            "bundles with quantized, dequantized or merged weights, or with a profile, are "
            "compared by lvlm-export alone"
        )
    held = manifest.cache_dtype if manifest.cache_dtype != manifest.dtype else None
    dtype = next(k for k, v in DTYPES.items() if str(v) == f"torch.{manifest.dtype}")
    plan = make_plan(
        ExportOptions(
            model,
            recorded(manifest),
            bundle,
            dtype,
            cache=next((k for k, v in CACHES.items() if str(v) == f"torch.{held}"), None),
            max_text_len=manifest.capacity.max_text_len,
            max_images=manifest.capacity.max_images,
        )
    )
    peak, began = Peak(), time.perf_counter()
    try:
        outcome = validation.validate(plan, bundle, lambda text: print(text, flush=True))
    finally:
        print(f"time         {time.perf_counter() - began:.0f} s")
        print(f"peak memory  {peak.stop() / 1e9:.2f} GB, the page cache aside")
    print(table(outcome.checks))
    print(json.dumps({**dataclasses.asdict(outcome), "checks": len(outcome.checks)}, indent=1))
    return 0


def recorded(manifest: Manifest) -> Recipe:
    """The recipe that a bundle was exported with."""
    given = [f"{k}={json.dumps(v)}" for k, v in manifest.parameters.items() if v is not None]
    return parse_settings(discover("lvlm.export.recipes", "RECIPE")[manifest.recipe], given)


class Peak:
    """The most anonymous memory of this process, looked at ten times a second (Linux)."""

    def __init__(self) -> None:
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.bytes

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.bytes = max(self.bytes, int(line.split()[1]) * 1024)
