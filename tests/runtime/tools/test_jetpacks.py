"""Which JetPack a Jetson has, and what its engines are built for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lvlm.core.errors import BackendError
from lvlm.core.nvidia import NvidiaDriver
from lvlm.runtime.tools.doctor import examine
from lvlm.runtime.tools.findings import Finding, Machine, can_run

CPU = Finding("device cpu", True, "")


def finding(release: str, folder: Path) -> Finding:
    """What the doctor finds on a machine whose /etc/nv_tegra_release begins so."""

    def absent() -> NvidiaDriver:
        raise BackendError("none; none")

    def attempt(code: str) -> str:
        raise BackendError(code)

    path = folder / "nv_tegra_release"
    path.write_text(release)
    machine = Machine(absent, lambda _: None, attempt, jetson=path)
    found = {finding.subject: finding for finding in examine(None, machine)}
    nothing = dataclasses.replace(machine, jetson=folder / "none")
    assert "JetPack" not in {finding.subject for finding in examine(None, nothing)}
    return found["JetPack"]


@pytest.mark.parametrize(
    ("release", "name", "trt", "target"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 3", "6.1 or 6.2", "10.3", "jetson-orin-jp62"),
        ("# R38 (release), REVISION: 2.1, GCID: 4", "7.0", "10.13", "jetson-thor-jp7"),
        ("# R38 (release), REVISION: 4.0, GCID: 4", "7.1", "10.13", "jetson-thor-jp7"),
        ("# R39 (release), REVISION: 2.0, GCID: 5", "7.2", "10.16", "jetson-jp72"),
        ("# R39 (release), REVISION: 2.1, GCID: 5", "7.2", "10.16", "jetson-jp72"),
    ],
)
def test_a_known_one(release: str, name: str, trt: str, target: str, tmp_path: Path) -> None:
    found = finding(release, tmp_path)
    assert found.ok
    assert found.says.startswith(f"{name} (Jetson Linux ")
    assert f"TensorRT {trt}, " in found.says
    assert found.says.endswith(f"lvlm-build engine --target {target}")


@pytest.mark.parametrize(
    ("release", "says", "fix"),
    [
        ("# R41 (release), REVISION: 1.0, GC", "41.1.0 is of no JetPack that", "--list-targets"),
        ("# R36 (release), REVISION: 3.0, GC", "TensorRT 8.6", "install JetPack 7.2; TensorRT 8.6"),
        ("something else", "says nothing of a release", "--list-targets"),
        ("", "says nothing of a release", "--list-targets"),
    ],
)
def test_one_that_nobody_knows(release: str, says: str, fix: str, tmp_path: Path) -> None:
    found = finding(release, tmp_path)
    assert says in found.says
    assert fix in found.fix
    assert "\n" not in found.says + found.fix
    assert not can_run([CPU, found])  # exit status 2
    assert can_run([CPU])
