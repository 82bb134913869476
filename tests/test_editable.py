"""An editable install: Python and mypy see files that came later, without installing again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import setuptools.build_meta as backend; backend.build_editable('dist')"
USES = "from lvlm.runtime.attic.boxes import VALUE\nfrom lvlm.{home} import later\n"


@pytest.mark.slow
def test_new_files_are_seen_by_python_and_mypy(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", ".*", "digits-llava")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    apart = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    subprocess.run(
        [sys.executable, "-c", BUILD], cwd=checkout, env=apart, check=True, capture_output=True
    )
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (wheel,) = (checkout / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)

    rooms = {"export.ops": "export/ops", "bench": "calibration/bench"}
    (checkout / "runtime/attic").mkdir()
    (checkout / "runtime/attic/boxes.py").write_text("VALUE = 3\n")
    for folder in rooms.values():
        (checkout / folder / "later.py").touch()
    for home in rooms:
        uses = tmp_path / "uses.py"
        uses.write_text(USES.format(home=home))
        for command in (
            [python, "uses.py"],
            [
                *(sys.executable, "-m", "mypy", "--python-executable", python),
                *("--follow-imports=skip", "uses.py"),
            ],
        ):
            done = subprocess.run(command, cwd=tmp_path, env=apart, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr

    # Where nothing can be installed, the same links alone (scripts/with_package.sh)
    shutil.rmtree(checkout / ".editable")
    subprocess.run([sys.executable, "setup.py", "--quiet", "links"], cwd=checkout, check=True)
    links = {"PYTHONPATH": str(checkout / ".editable")}
    subprocess.run([python, "-P", "-c", "import lvlm.bench.later"], env=links, check=True)
