"""The commands there are: verb -> module with ``main``."""

from __future__ import annotations

PREFIX = "lvlm-"
# What runs and builds engines on a device, also with JetPack 6's Python; the others need 3.11
ON_PYTHON_3_10 = frozenset({"build", "doctor", "run"})
MODULES = {
    "bench": "lvlm.bench.bench_cli",
    "build": "lvlm.plugins_trt.build_cli",
    "calibrate": "lvlm.calibration.profile.calibrate_cli",
    "compare": "lvlm.export.compare.compare_cli",
    "doctor": "lvlm.runtime.tools.doctor_cli",
    "eval": "lvlm.calibration.evaluate.eval_cli",
    "export": "lvlm.export.export_cli",
    "fleet": "lvlm.bench.fleet.fleet_cli",
    "run": "lvlm.runtime.run_cli",
    "serve": "lvlm.runtime.server.serve_cli",
    "tune": "lvlm.calibration.tune.tune_cli",
}
