"""JSON that nobody vouches for, as typed dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from lvlm.core.errors import BundleError, ParameterError, shown

T = TypeVar("T")
LEVELS = 20  # of lists and objects in one another, in a field of any type
LARGEST = 2**63 - 1  # what arrays of integers hold
MAX_BYTES = 64 << 20  # of a file; the manifest of a 7B model has 1 MB


def read_json(path: Path) -> Any:
    """The JSON of a file. Raises BundleError if it is not JSON, or far too large for it."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        reason: object = "it is nested too deeply"
    except OSError as error:
        reason = error.strerror
    except ValueError as error:  # of JSON, UTF-8 and numbers of more than 4,300 digits
        reason = error
    raise BundleError(f"{path} cannot be read ({reason}); export the bundle again")


def decode(kind: type[T], data: Any, where: str) -> T:
    """``data`` (from JSON) as the typed ``kind``; BundleError names the field that does not fit.

    Integers are below 2**63, text can be written as UTF-8.
    """
    return typing.cast(T, _decode(kind, data, where))


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _bounded(data, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _object(kind, data, where)
    if origin is tuple and isinstance(data, list | tuple):
        return tuple(_decode(arguments[0], x, f"{where}[{i}]") for i, x in enumerate(data))
    if origin is dict and isinstance(data, Mapping):
        return {str(k): _decode(arguments[1], v, _member(where, k)) for k, v in data.items()}
    if origin is Literal and data in arguments:
        return data
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, data, where)
    if isinstance(data, bool) == (kind is bool):  # to Python, True is an integer
        if kind is float and isinstance(data, int | float) and abs(data) <= sys.float_info.max:
            return float(data)
        if kind is float and isinstance(data, float):  # infinite, or not a number
            return data
        if isinstance(kind, type) and isinstance(data, kind) and _usable(data):
            return data
    raise _unfit(data, where)


def _object(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise BundleError(f"{where} is not an object; export the bundle again")
    hints = _hints(kind)
    if unknown := set(data) - set(hints):
        name = shown(min(unknown))
        raise BundleError(f"{where}: unknown field {name}; export the bundle again")
    if missing := _required(kind) - set(data):
        raise BundleError(f"{where}: missing field '{min(missing)}'; export the bundle again")
    values = {k: _decode(hints[k], v, f"{where}.{k}") for k, v in data.items()}
    try:
        return kind(**values)
    except ParameterError as error:  # what its own checks refuse
        raise BundleError(f"{where}: {error}; export the bundle again") from None


@functools.cache  # evaluates every annotation's text anew, most of what a manifest takes
def _hints(kind: Any) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)


@functools.cache
def _required(kind: Any) -> set[str]:
    """The fields without a default, which earlier schemas lack."""
    defaults = {f.name: (f.default, f.default_factory) for f in dataclasses.fields(kind)}
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    return {name for name, default in defaults.items() if default == absent}


def _one_of(options: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in options:
        return None
    kinds = [option for option in options if option is not type(None)]
    if len(kinds) == 1:  # its own message says what does not fit
        return _decode(kinds[0], data, where)
    if all(dataclasses.is_dataclass(option) for option in kinds):
        return _decode(_variant(kinds, data, where), data, where)
    for option in kinds:
        try:
            return _decode(option, data, where)
        except BundleError:
            continue
    raise _unfit(data, where)


def _variant(options: list[Any], data: Any, where: str) -> Any:
    """The one of several dataclasses whose ``kind`` it is."""
    if not isinstance(data, Mapping):
        raise BundleError(f"{where} is not an object; export the bundle again")
    kinds = {f.default: o for o in options for f in dataclasses.fields(o) if f.name == "kind"}
    name = data.get("kind")
    if not isinstance(name, str) or name not in kinds:
        raise BundleError(f"{where} is of unknown kind {shown(name)}; export the bundle again")
    return kinds[name]


def _bounded(data: Any, where: str, levels: int = LEVELS) -> Any:
    """A field of any type, whose text and integers are bounded, too."""
    if levels == 0:
        raise BundleError(f"{where} is nested too deeply; export the bundle again")
    if not _usable(data):
        raise _unfit(data, where)
    for item in data.items() if isinstance(data, dict) else ():
        _bounded(item, where, levels - 1)
    for item in data if isinstance(data, list | tuple) else ():
        _bounded(item, where, levels - 1)
    return data


def _usable(data: Any) -> bool:
    if isinstance(data, int):
        return abs(data) <= LARGEST
    if isinstance(data, str):
        return data.isascii() or all(not "\ud800" <= c <= "\udfff" for c in data)
    return True


def _member(where: str, key: object) -> str:
    """A field of an object whose names are not ours."""
    name = str(key)
    return (
        f"{where}.{name}" if name.isprintable() and len(name) < 100 else f"{where}[{shown(name)}]"
    )


def _unfit(data: Any, where: str) -> BundleError:
    return BundleError(f"{where} holds {shown(data)}, which does not fit; export the bundle again")
