"""Break the product, see the tests notice: each of FAULTS in a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FAULTS, USUAL, Fault
from faults_page import PAGE, page

import lvlm

ROOT = Path(__file__).parents[2]
RUN = """
import sys, lvlm, pytest
assert lvlm.__file__.startswith(sys.argv[1]), lvlm.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "noticed" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole")
        metafunc.parametrize("noticed", list(FAULTS) if whole else USUAL)


def broken_package(fault: Fault, folder: Path) -> Path:
    """A folder for PYTHONPATH with a copy of the package that has the fault."""
    source = Path(str(lvlm.__file__)).parent
    shutil.copytree(source, folder / "lvlm")  # compiled files, too: they need not be made again
    path = folder / "lvlm" / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, f"{fault.file} has changed: {fault.old!r}"
    path.write_text(text.replace(fault.old, fault.new))
    return folder


@pytest.mark.slow
def test_a_fault_is_noticed(noticed: str, tmp_path: Path) -> None:
    """By a comparison that fails, not by a crash, which anything at all would notice."""
    fault = FAULTS[noticed]
    package = broken_package(fault, tmp_path / "package")
    command = [sys.executable, "-c", RUN, str(package), fault.test, "-x", "-rf", "--tb=no"]
    command += ["-p", "no:cacheprovider", f"--basetemp={tmp_path / 'run'}"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {"PYTHONPATH": str(package), "COLUMNS": "400"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"^FAILED .* - (AssertionError|assert )", done.stdout, re.M), done.stdout


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_still_fits_the_source(name: str) -> None:
    fault = FAULTS[name]
    text = (Path(str(lvlm.__file__)).parent / fault.file).read_text()
    assert text.count(fault.old) == 1
    compile(text.replace(fault.old, fault.new), fault.file, "exec")
    assert (ROOT / fault.test.partition("::")[0]).is_file()


def test_the_note_lists_the_faults() -> None:
    assert PAGE.read_text() == page(), "run python tests/mutations/faults_page.py"
