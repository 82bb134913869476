"""ONNX Runtime's C library, for what its Python package has no call for: sessions that share their
packed weights.

For fast MatMuls ONNX Runtime packs each weight anew, a copy per session. Sessions made with one
container keep one copy of what they have in common. The library lies in the package itself; its
functions are found by their place in the table ``OrtApi``, to which versions only append.
"""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

API_VERSION = 16  # of the table: any that has every function below
POINTER_OUT = POINTER(c_void_p)
# Place in the table, and arguments. Release functions return nothing, the others a status.
FUNCTIONS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "CreateEnv": (3, (c_int, c_char_p, POINTER_OUT)),
    "CreateSessionOptions": (10, (POINTER_OUT,)),
    "DisableMemPattern": (17, (c_void_p,)),
    "SetSessionLogSeverityLevel": (22, (c_void_p, c_int)),
    "SetIntraOpNumThreads": (24, (c_void_p, c_int)),
    "SessionGetInputCount": (30, (c_void_p, POINTER(c_size_t))),
    "SessionGetOutputCount": (31, (c_void_p, POINTER(c_size_t))),
    "SessionGetInputName": (36, (c_void_p, c_size_t, c_void_p, POINTER_OUT)),
    "SessionGetOutputName": (37, (c_void_p, c_size_t, c_void_p, POINTER_OUT)),
    "CreateRunOptions": (39, (POINTER_OUT,)),
    "RunOptionsSetTerminate": (46, (c_void_p,)),
    "CreateTensorWithDataAsOrtValue": (
        49,
        (c_void_p, c_void_p, c_size_t, POINTER(c_int64), c_size_t, c_int, POINTER_OUT),
    ),
    "CreateCpuMemoryInfo": (69, (c_int, c_int, POINTER_OUT)),
    "AllocatorFree": (76, (c_void_p, c_void_p)),
    "GetAllocatorWithDefaultOptions": (78, (POINTER_OUT,)),
    "ReleaseStatus": (93, (c_void_p,)),
    "ReleaseSession": (95, (c_void_p,)),
    "ReleaseValue": (96, (c_void_p,)),
    "ReleaseRunOptions": (97, (c_void_p,)),
    "ReleaseSessionOptions": (100, (c_void_p,)),
    "AddSessionConfigEntry": (130, (c_void_p, c_char_p, c_char_p)),
    "RunWithBinding": (133, (c_void_p, c_void_p, c_void_p)),
    "CreateIoBinding": (134, (c_void_p, POINTER_OUT)),
    "ReleaseIoBinding": (135, (c_void_p,)),
    "BindInput": (136, (c_void_p, c_char_p, c_void_p)),
    "BindOutput": (137, (c_void_p, c_char_p, c_void_p)),
    "BindOutputToDevice": (138, (c_void_p, c_char_p, c_void_p)),
    "AddInitializer": (150, (c_void_p, c_char_p, c_void_p)),
    "CreatePrepackedWeightsContainer": (166, (POINTER_OUT,)),
    "ReleasePrepackedWeightsContainer": (167, (c_void_p,)),
    "CreateSessionWithPrepackedWeightsContainer": (
        168,
        (c_void_p, c_char_p, c_void_p, c_void_p, POINTER_OUT),
    ),
    "RegisterCustomOpsLibrary_V2": (228, (c_void_p, c_char_p)),
}
# ONNXTensorElementDataType, by the manifest's names
ELEMENTS = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "bfloat16": 16,
    "uint4": 21,
    "int4": 22,
}
FATAL = 4  # what is logged: errors are raised, and a request that is cancelled is none


class OrtError(Exception):
    """An error that ONNX Runtime reports."""


def find_library() -> Path | None:
    """The C library in the package onnxruntime, which is not imported; None where there is none."""
    try:
        spec = importlib.util.find_spec("onnxruntime")
    except ValueError:  # of a module that somebody made up
        spec = None
    folders = () if spec is None else spec.submodule_search_locations or ()
    patterns = ("libonnxruntime.so*", "libonnxruntime*.dylib", "onnxruntime.dll")
    for folder in folders:
        for pattern in patterns:
            for path in sorted((Path(folder) / "capi").glob(pattern)):
                return path
    return None


class LibraryHandle:
    """An object of the library, released with this one, and before anything that it ``uses``."""

    def __init__(
        self, library: OrtLibrary, pointer: c_void_p, release: str, uses: Sequence[object] = ()
    ) -> None:
        self.pointer = pointer
        function = library.functions[release]
        weakref.finalize(self, _release, function, pointer, uses).atexit = False


class OrtLibrary:
    """The functions by name; those that fail raise OrtError."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.OrtGetApiBase.restype = POINTER_OUT
        get_api = ctypes.CFUNCTYPE(c_void_p, ctypes.c_uint32)(library.OrtGetApiBase()[0])
        table = get_api(API_VERSION)
        if not table:
            raise OrtError(f"{path.name} is older than version 1.{API_VERSION}")
        entries = ctypes.cast(table, POINTER_OUT)
        self.functions: dict[str, Callable[..., Any]] = {
            name: ctypes.CFUNCTYPE(None if name.startswith("Release") else c_void_p, *arguments)(
                entries[place]
            )
            for name, (place, arguments) in FUNCTIONS.items()
        }
        self._message = ctypes.CFUNCTYPE(c_char_p, c_void_p)(entries[2])
        self.environment = self.create("CreateEnv", FATAL, b"lvlm")
        self.memory = self.create("CreateCpuMemoryInfo", 0, 0)  # the device's own, by default
        self.allocator = self.create("GetAllocatorWithDefaultOptions")

    def call(self, name: str, *arguments: Any) -> None:
        status = self.functions[name](*arguments)
        if status:
            message = self._message(status).decode(errors="replace")
            self.functions["ReleaseStatus"](status)
            raise OrtError(message)

    def create(self, name: str, *arguments: Any) -> c_void_p:
        """The object that a function writes to its last argument."""
        made = c_void_p()
        self.call(name, *arguments, ctypes.byref(made))
        return made

    def tensor(self, array: np.ndarray, dtype: str, dims: tuple[int, ...]) -> c_void_p:
        """An OrtValue over an array's memory; to be released, the array to be kept."""
        return self.create(
            "CreateTensorWithDataAsOrtValue",
            self.memory,
            array.ctypes.data,
            array.nbytes,
            (c_int64 * len(dims))(*dims),
            len(dims),
            ELEMENTS[dtype],
        )

    def container(self) -> LibraryHandle:
        """A container of the sessions' packed weights; must outlive them."""
        made = self.create("CreatePrepackedWeightsContainer")
        return LibraryHandle(self, made, "ReleasePrepackedWeightsContainer")

    def session(
        self,
        file: Path,
        threads: int | None,
        weights: Mapping[str, LibraryHandle],
        container: LibraryHandle,
        kernels: Path | None = None,
    ) -> LibraryHandle:
        """A graph on the CPU; ``weights`` stand in for its external initializers. ``kernels``: a
        library of custom ops, which are taken in place of the graph's functions of their names."""
        options = LibraryHandle(self, self.create("CreateSessionOptions"), "ReleaseSessionOptions")
        self.call("SetSessionLogSeverityLevel", options.pointer, FATAL)
        # One plan of memory for each length of prompt that was met, beside what the arena has
        self.call("DisableMemPattern", options.pointer)
        # A session's threads would go on spinning after a run, against those of the next session
        entry = (b"session.force_spinning_stop", b"1")
        self.call("AddSessionConfigEntry", options.pointer, *entry)
        if threads is not None:
            self.call("SetIntraOpNumThreads", options.pointer, threads)
        if kernels is not None:
            self.call("RegisterCustomOpsLibrary_V2", options.pointer, _path(kernels))
        for name, value in weights.items():
            self.call("AddInitializer", options.pointer, name.encode(), value.pointer)
        made = self.create(
            "CreateSessionWithPrepackedWeightsContainer",
            self.environment,
            _path(file),
            options.pointer,
            container.pointer,
        )
        return LibraryHandle(self, made, "ReleaseSession", (container, *weights.values()))

    def ports(self, session: LibraryHandle) -> tuple[list[str], list[str]]:
        """Names of a session's inputs and outputs."""
        return self._names(session, "Input"), self._names(session, "Output")

    def _names(self, session: LibraryHandle, which: str) -> list[str]:
        count = c_size_t()
        self.call(f"SessionGet{which}Count", session.pointer, ctypes.byref(count))
        names = []
        for index in range(count.value):
            made = self.create(f"SessionGet{which}Name", session.pointer, index, self.allocator)
            names.append(ctypes.string_at(made.value or 0).decode())
            self.call("AllocatorFree", self.allocator, made)
        return names


def _release(function: Callable[..., Any], pointer: c_void_p, _uses: Sequence[object]) -> None:
    """Called with what the object uses, which lives until then for that."""
    function(pointer)


def _path(file: Path) -> bytes:
    """The path in the library's characters: UTF-16 on Windows."""
    import os

    return f"{file}\0".encode("utf-16-le") if os.name == "nt" else os.fsencode(file)
