"""The JetPacks of Jetsons: which release of Jetson Linux each is, and what an engine is built for.

Of NVIDIA's release notes. A new JetPack is a line of JETPACKS.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lvlm.runtime.tools.findings import Finding


@dataclass(frozen=True)
class JetPack:
    """linux     releases of Jetson Linux, (major, minor): all their revisions
    tensorrt  (major, minor) of the TensorRT that it has
    targets   of ``lvlm-build engine``, by GPU architecture; {}: that TensorRT is too old"""

    name: str
    linux: tuple[int, int]
    tensorrt: tuple[int, int]
    python: str
    targets: dict[int, str]


ORIN, THOR = 87, 110
JETPACKS = (
    JetPack("6.0", (36, 3), (8, 6), "3.10", {}),
    JetPack("6.1 or 6.2", (36, 4), (10, 3), "3.10", {ORIN: "jetson-orin-jp62"}),
    JetPack("7.0", (38, 2), (10, 13), "3.12", {THOR: "jetson-thor-jp7"}),
    JetPack("7.1", (38, 4), (10, 13), "3.12", {THOR: "jetson-thor-jp7"}),
    JetPack("7.2", (39, 2), (10, 16), "3.12", {ORIN: "jetson-jp72", THOR: "jetson-jp72"}),
)
# As /etc/nv_tegra_release begins: # R36 (release), REVISION: 4.3, GCID: …
RELEASE = re.compile(r"R(\d+) \(release\), REVISION: (\d+)((?:\.\d+)*)")


def jetpack_finding(release: str) -> Finding:
    """JetPack of the text of ``/etc/nv_tegra_release``, and what it means for engines."""
    found = RELEASE.search(release)
    if found is None:
        says = "/etc/nv_tegra_release says nothing of a release of Jetson Linux"
        return Finding("JetPack", False, says, _choose(), broken=True)
    linux, (major, minor) = f"Jetson Linux {found[1]}.{found[2]}{found[3]}", found.groups()[:2]
    for jetpack in JETPACKS:
        if jetpack.linux == (int(major), int(minor)):
            return _known(jetpack, linux)
    known = ", ".join(jetpack.name for jetpack in JETPACKS)
    says = f"{linux} is of no JetPack that this version knows ({known})"
    return Finding("JetPack", False, says, _choose(), broken=True)


def _known(jetpack: JetPack, linux: str) -> Finding:
    trt = "{}.{}".format(*jetpack.tensorrt)
    says = f"{jetpack.name} ({linux}): TensorRT {trt}, Python {jetpack.python}"
    if not jetpack.targets:
        fix = f"install JetPack {JETPACKS[-1].name}; TensorRT {trt} is older than any target's"
        return Finding("JetPack", False, says, fix, broken=True)
    targets = " or ".join(dict.fromkeys(jetpack.targets.values()))
    return Finding("JetPack", True, f"{says}; lvlm-build engine --target {targets}")


def _choose() -> str:
    return "take the target of the TensorRT that is here: lvlm-build engine --list-targets"
