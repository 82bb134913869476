"""Small damage: to bytes, to JSON, to files."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**32 + 1, 2**63, 10**30, -(10**30)),
    *(0.5, 1.0, -0.5, 1e308, 1e-320, float("nan"), float("inf"), "", " ", "x" * 100_000),
    *("\ud800", "a\0b", "../x", "/etc/passwd", "a\nb\nc\nd\ne", "float32", "<image>", "€" * 50),
    *([], {}, [[]], [None], [{}], {"": ""}, [0] * 1000, ["x"], {"x": {"x": {"x": []}}}),
)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        long = rng.choice((1, 1, 2, 4, 8, 64, 1000))
        match rng.randrange(7):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + long] = rng.randbytes(long)
            case 2:
                changed[at:at] = rng.randbytes(long)
            case 3:
                del changed[at : at + long]
            case 4:
                del changed[at:]
            case 5:
                changed[at:at] = changed[at : at + long]
            case _:
                changed[at : at + long] = rng.choice((b"\0", b"\xff", b"\x80")) * long
    return bytes(changed)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within ``value``."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        below = (*path, key)
        found += places(inner, below) if isinstance(inner, dict | list) else [below]
    return found


def mutate_json(rng: random.Random, value: Any, times: int | None = None) -> Any:
    """A changed copy. Keys near the root are as likely as all that lie deep together."""
    value = json.loads(json.dumps(value))
    for _ in range(times or rng.choice((1, 1, 1, 2, 3))):
        known = places(value)
        if not known:
            return rng.choice(ODD)
        depth = rng.choice(sorted({len(path) for path in known}))
        *path, key = rng.choice([p for p in known if len(p) == depth])
        inside = value
        for part in path:
            inside = inside[part]
        match rng.randrange(8):
            case 0:
                del inside[key]
            case 1:
                other = rng.choice(known)
                taken = value
                for part in other:
                    taken = taken[part] if _has(taken, part) else taken
                inside[key] = json.loads(json.dumps(taken))
            case 2 | 3 if _is_number(inside[key]):
                factor = rng.choice((-1, 0, 2, 1000, 0.5))
                inside[key] = int(inside[key] * factor) + rng.choice((0, 1))
            case 4 if isinstance(inside[key], bool):
                inside[key] = not inside[key]
            case 5 if isinstance(inside, dict):
                inside[f"{key}{rng.choice(('s', '_', ' ', 'é'))}"] = inside.pop(key)
            case _:
                inside[key] = rng.choice(ODD)
    return value


def _has(value: Any, part: Any) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and abs(value) < 1e300)


def json_bytes(rng: random.Random, value: Any) -> bytes:
    """As a file; now and then one that is no JSON, or none that anybody should write."""
    text = json.dumps(value)
    match rng.randrange(40):
        case 0:
            return mutate_bytes(rng, text.encode())
        case 1:
            return b"\xef\xbb\xbf" + text.encode()
        case 2:
            return text.encode("utf-16")
        case 3:
            deep = rng.choice((100, 2000, 100_000))
            at = text.rfind(":") + 1
            return (text[:at] + "[" * deep + "]" * deep + "}" * text.count("{")).encode()
        case 4:
            return text.replace("1", "1" * rng.choice((2, 30, 5000)), 1).encode()
        case _:
            return text.encode()


def replace(path: Path, data: bytes) -> None:
    """Other content under a name that may be a link."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def odd_file(rng: random.Random, path: Path) -> None:
    """Something else than the file that was there."""
    data = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    match rng.randrange(9):
        case 0:
            pass
        case 1:
            path.touch()
        case 2:
            path.mkdir()
        case 3:
            os.mkfifo(path)
        case 4:
            path.symlink_to(path.name)
        case 5:
            path.symlink_to("/nowhere/at/all")
        case 6:
            path.symlink_to("/dev/zero")
        case 7:
            path.write_bytes(rng.randbytes(rng.choice((1, 100, 10_000))))
        case _:
            path.write_bytes(data[: rng.randrange(len(data) + 1)])


def linked(folder: Path, copy: Path) -> Path:
    """A folder of links to the files of another: what is replaced in it changes nothing there."""
    copy.mkdir(parents=True)
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    return copy
