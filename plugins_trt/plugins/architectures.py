"""NVIDIA GPU architectures that kernels are compiled for, by compute capability without the dot."""

from __future__ import annotations

from collections.abc import Iterable

from lvlm.core.discovery import nearest
from lvlm.core.errors import ParameterError

# The most shared memory that a block may ask for, in bytes; sources: CUDA C++ Programming Guide,
# technical specifications per compute capability.
SHARED_LIMIT = {
    80: 163 << 10,  # A100
    86: 99 << 10,  # A10, RTX 30
    87: 163 << 10,  # Jetson Orin
    89: 99 << 10,  # L4, RTX 40
    90: 227 << 10,  # H100, H200
    100: 227 << 10,  # B200
    103: 227 << 10,  # B300
    110: 227 << 10,  # Jetson Thor
    120: 99 << 10,  # RTX 50
    121: 99 << 10,  # DGX Spark
}
# Code for these runs nowhere else, and no other code on them: Tegra is apart from desktop GPUs, and
# Triton compiles from 90 on for the architecture's own instructions (sm_90a, …).
ALONE = frozenset(arch for arch in SHARED_LIMIT if arch == 87 or arch >= 90)
# PTX for this runs, compiled by the driver, on every one of them.
PORTABLE = 80


def parse_architectures(texts: Iterable[str]) -> list[int]:
    """Numbers from words like 87, sm_87 or 8.7. Raises ParameterError for unknown ones."""
    known = {str(arch): arch for arch in SHARED_LIMIT}
    found = []
    for text in texts:
        word = text.strip().lower().removeprefix("sm_").replace(".", "").rstrip("a")
        if word not in known:
            raise nearest("architecture", text.strip(), known)
        found.append(known[word])
    if not found:
        raise ParameterError("no architecture is given; write --arch 87, say")
    return sorted(set(found))
