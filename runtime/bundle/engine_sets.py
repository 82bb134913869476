"""Engines beside a bundle: what ``engine.json`` says of them, and whether they fit this machine.

``lvlm-build engine`` writes them into folders of ``<bundle>/engines``; a backend reads them:

    for engines in EngineSet.find(bundle, "tensorrt"): …          # every set of that package
    engines.check(gpu_sm=87, gpu_name="Orin", version="10.3.0", plugin_hash=None, manifest=manifest)
    engines.folder / engines.graphs["decode"].file
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvlm.core.errors import BackendError, BundleError
from lvlm.core.integrity import File, Verify, check_files
from lvlm.core.typed_json import decode
from lvlm.runtime.bundle.manifest import Manifest

FOLDER = "engines"
FILE = "engine.json"
SCHEMA = 2
BOUNDS = {"least": "min", "usual": "opt", "most": "max"}  # of a Range, as schema 1 called them
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of weights' types
ALIGNMENT = 256  # bytes; what TensorRT asks of every address, and cudaMalloc gives
PLUGINS = "LVLM_PLUGINS"  # environment variable: the plugin library to load


class NoEnginesError(BackendError):
    """None were built for this bundle."""


@dataclass(frozen=True)
class Range:
    """A dimension of an optimization profile."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class EngineWeight:
    """An input that is a weight: ``bytes`` of the bundle's ``file`` from ``offset`` on, row-major;
    with ``columns`` [start, stop) those of a matrix that lies there.

    An engine that has such inputs holds no copy of them; those of one name are the same in every
    engine of a set, so that one upload serves all. ``dims`` are the input's.
    """

    name: str
    file: str
    offset: int
    bytes: int
    dtype: str
    dims: tuple[int, ...]
    columns: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the input."""
        return math.prod(self.dims) * ITEM_BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class EngineGraph:
    """One engine. ``profile``: the lengths it takes, by the names of the manifest's dimensions;
    ``source``: the graph it was built from, a file of the bundle; ``activations``: bytes of memory
    that it computes in at its longest lengths, None where the builder did not say."""

    file: str
    sha256: str
    bytes: int
    source: str
    profile: dict[str, Range]
    weights: tuple[EngineWeight, ...]
    activations: int | None = None


@dataclass(frozen=True)
class PluginLibrary:
    """``file`` lies beside the engines."""

    file: str
    sha256: str


@dataclass(frozen=True)
class EngineSet:
    """The engines of one folder.

    folder               where they are; not in the file
    target               as ``lvlm-build engine --target`` takes it
    flavour, version     tensorrt or tensorrt-rtx, and its version
    gpu                  name of the GPU they were built on; None: built ahead of time
    sms                  architectures they run on
    hardware_compatible  they also run on every later one (sm_80 and up)
    version_compatible   they also run on later versions with the same major number
    plugins              None where no plugin is needed
    bundle               sha256 of the bundle's graphs and weights they were built from
    options              other flags they were built with
    """

    folder: Path
    schema: int
    target: str
    flavour: str
    version: str
    gpu: str | None
    sms: tuple[int, ...]
    hardware_compatible: bool
    version_compatible: bool
    plugins: PluginLibrary | None
    bundle: dict[str, str]
    options: tuple[str, ...]
    graphs: dict[str, EngineGraph]

    @classmethod
    def find(cls, bundle: Path, flavour: str) -> list[EngineSet]:
        """Every set of a bundle for this flavour. Raises BackendError if there is none."""
        folders = sorted(path.parent for path in (bundle / FOLDER).glob(f"*/{FILE}"))
        # Files are verified when a set is chosen: .read().
        found = [s for s in (cls._parse(f) for f in folders) if s.flavour == flavour]
        if not found:
            raise NoEnginesError(
                f"{bundle} has no engines for {flavour}; build them with lvlm-build engine "
                f"{bundle} --target NAME (--list-targets lists the names)"
            )
        return found

    @classmethod
    def read(cls, folder: Path, *, verify: Verify = "sample") -> EngineSet:
        """The set in ``folder``, whose files are all there; ``verify``: and have their hashes, see
        ``check_files``.

        Raises BackendError that says what is wrong.
        """
        engines = cls._parse(folder)
        files = {g.file: File(g.sha256, g.bytes) for g in engines.graphs.values()}
        try:
            check_files(folder, files, verify)
        except BundleError as error:
            reason = str(error).partition(";")[0].replace("its export", "it was built")
            raise BackendError(f"{reason}; {engines.mend}") from None
        return engines

    @classmethod
    def _parse(cls, folder: Path) -> EngineSet:
        path = folder / FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BackendError(
                f"{path} cannot be read ({error}); build these engines again"
            ) from None
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema == 1:
            data, schema = _upgraded(data), SCHEMA
        if schema != SCHEMA:
            raise BackendError(
                f"{path} has schema {schema!r}, this version reads {SCHEMA}; build these engines "
                "again with this version"
            )
        try:
            return decode(cls, {**data, "folder": folder}, FILE)
        except BundleError as error:
            reason = str(error).partition(";")[0]
            raise BackendError(f"{folder}: {reason}; build these engines again") from None

    def plugin_library(self) -> Path | None:
        """The plugin library to load: the environment's, or the one beside the engines. None where
        they need none; raises BackendError where it is not there."""
        if self.plugins is None:
            return None
        given = os.environ.get(PLUGINS)
        path = Path(given) if given else self.folder / self.plugins.file
        if not path.is_file():
            hint = f"as {PLUGINS} says" if given else f"set {PLUGINS} to where it is"
            raise BackendError(
                f"the plugin library {path} is not there; {hint}, or build it with "
                "lvlm-build plugins"
            )
        return path

    def write(self) -> None:
        data = dataclasses.asdict(self)
        del data["folder"]
        text = json.dumps(data, indent=1, ensure_ascii=False)
        (self.folder / FILE).write_text(text + "\n", encoding="utf-8")

    def check(
        self,
        *,
        gpu_sm: int,
        gpu_name: str,
        version: str,
        plugin_hash: str | None,
        manifest: Manifest,
    ) -> None:
        """Check that these engines fit this machine and this bundle.

        gpu_sm       10 · major + minor of the compute capability
        version      of the TensorRT package that is to run them
        plugin_hash  sha256 of the plugin library that is loaded, if one is
        Raises BackendError that says in one line what differs and how to rebuild.
        """
        wrong = [
            *self._gpu_differs(gpu_sm, gpu_name),
            *self._version_differs(version),
            *self._plugins_differ(plugin_hash),
            *self._bundle_differs(manifest),
        ]
        if wrong:
            what = f"the engines in {self.folder} do not fit: {', '.join(wrong)}"
            raise BackendError(f"{what}; {self._mend({*self.sms, gpu_sm})}")

    @property
    def mend(self) -> str:
        """The command that builds this set again, on the machine that is to run it."""
        return self._mend(self.sms)

    def _mend(self, sms: Collection[int]) -> str:
        inside = self.folder.parent.name == FOLDER
        bundle = self.folder.parent.parent if inside else Path("BUNDLE")
        words = ["lvlm-build engine", str(bundle), "--target", self.target, *self.options]
        if self.gpu is None:
            words += ["--sm", ",".join(map(str, sorted(sms)))]
        return f"rebuild them: {' '.join(words)} --force"

    def _gpu_differs(self, sm: int, name: str) -> Iterator[str]:
        if self.hardware_compatible and sm >= min((80, *self.sms)):
            return
        if sm not in self.sms:
            built = ", ".join(f"sm_{s}" for s in self.sms) + (f" ({self.gpu})" if self.gpu else "")
            yield f"they are for {built}, this GPU is sm_{sm} ({name})"
        elif self.gpu not in (None, name):
            yield f"they were built on {self.gpu}, this GPU is {name}"

    def _version_differs(self, version: str) -> Iterator[str]:
        built, here = _numbers(self.version), _numbers(version)
        later = self.version_compatible and here[:1] == built[:1] and here >= built
        if version != self.version and not later:
            yield f"they are of {self.flavour} {self.version}, here is {version}"

    def _plugins_differ(self, plugin_hash: str | None) -> Iterator[str]:
        if self.plugins is None or self.plugins.sha256 == plugin_hash:
            return
        if plugin_hash is None:
            yield f"they need the plugin library {self.plugins.file}, which is not loaded"
        else:
            yield (
                f"they need the plugin library of hash {self.plugins.sha256[:12]}, the one loaded "
                f"has {plugin_hash[:12]}"
            )

    def _bundle_differs(self, manifest: Manifest) -> Iterator[str]:
        for name, sha256 in self.bundle.items():
            if name not in manifest.files or manifest.files[name].sha256 != sha256:
                yield f"they were built from another export ({name} differs)"
                return
        for graph in self.graphs.values():
            for weight in graph.weights:
                if weight.file not in self.bundle:
                    yield f"the weight {weight.name} lies in {weight.file}, not in the bundle"
                    return


def _numbers(version: str) -> tuple[int, ...]:
    """10.3.0.30 as (10, 3, 0, 30)."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _upgraded(data: Any) -> Any:
    """Data of schema 1 in the words of this one."""
    if isinstance(data, dict):
        renamed = {BOUNDS.get(name, name): _upgraded(value) for name, value in data.items()}
        return renamed | ({"schema": SCHEMA} if "schema" in data else {})
    return data
