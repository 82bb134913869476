"""Listing what there is without the packages that only an export needs.

Families and recipes say themselves what they are, in modules that import torch and transformers.
To read that needs none of what these packages do, so empty modules stand in for them meanwhile:
a listing takes no seconds, and no installation of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lvlm.core.discovery import discover

PACKAGES = ("torch", "transformers", "safetensors", "onnx", "onnx_ir", "onnxscript", "ml_dtypes")


@contextmanager
def stand_ins() -> Iterator[None]:
    """Context in which the PACKAGES import as empty modules, unless torch is there already; what
    was imported with them is forgotten afterwards."""
    if "torch" in sys.modules:
        yield
        return
    before, finder = set(sys.modules), _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in PACKAGES or name.startswith("lvlm.export."):
                del sys.modules[name]
        discover.cache_clear()


class _Anything(type):
    """The metaclass of what can be called, inherited from, indexed, asked for names: all give
    itself."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing

    def __call__(cls, *args: Any, **options: Any) -> Any:
        # As a decorator without arguments it leaves what it decorates
        if cls is Nothing:
            return args[0] if len(args) == 1 and callable(args[0]) and not options else Nothing
        return super().__call__(*args, **options)

    def __getitem__(cls, key: Any) -> Any:
        return Nothing

    def __or__(cls, other: Any) -> Any:
        return Nothing

    __ror__ = __or__


class Nothing(metaclass=_Anything):
    """A class that stands for every name of a stand-in."""


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        own = fullname.partition(".")[0] in PACKAGES
        return ModuleSpec(fullname, self, is_package=True) if own else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
