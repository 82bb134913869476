"""Choice of the replica that a request goes to."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping


def ranked(key: str, loads: Mapping[str, int], spare: int, avoid: str = "") -> list[str]:
    """Replicas, the best first, by the requests that each one has.

    With a key: the first one of the key's own order (rendezvous hashing) that has less than
    ``spare`` requests more than the idlest, so that an image stays where its features are and no
    replica is overrun; when one comes or goes, only the keys that it is first for move. Without:
    the idlest. ``avoid`` comes last.
    """
    idlest = min((load for name, load in loads.items() if name != avoid), default=0)

    def place(name: str) -> tuple[bool, bool, float, float]:
        load = loads[name]
        if key and load < idlest + spare:
            return name == avoid, False, -_score(key, name), 0
        return name == avoid, True, load, random.random()

    return sorted(loads, key=place)


def _score(key: str, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{key} {name}".encode(), digest_size=8).digest())
