"""The graphs of a bundle in their form for a target: whether it takes them, and the files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from lvlm.core.errors import BuildError
from lvlm.core.installing import install
from lvlm.core.integrity import describe
from lvlm.core.output import whole_file
from lvlm.core.progress import Progress
from lvlm.core.typed_json import read_json
from lvlm.export.targets.target import Target
from lvlm.runtime.bundle.manifest import MANIFEST, Manifest
from lvlm.runtime.kv.static_capacity import static_capacity


def lowered(manifest: Manifest, target: Target) -> bool:
    """True where the bundle has the graphs of this target."""
    return all(target.file(graph.file) in manifest.files for graph in manifest.graphs.values())


def check_graphs(bundle: Path, manifest: Manifest, target: Target) -> None:
    """Raise what ``lower_bundle`` would, and write nothing: BuildError where graphs cannot be
    lowered here, ExportError for what the target does not take."""
    if lowered(manifest, target):
        return
    _check_packages(bundle, target)
    if manifest.quantization is None and manifest.cache_dtype == manifest.dtype:
        return  # there is nothing that a target refuses
    for graph in manifest.graphs.values():
        target.check(bundle / graph.file)


def lower_bundle(bundle: Path, manifest: Manifest, target: Target, progress: Progress) -> Manifest:
    """The manifest of a bundle that has the graphs of this target, made now where it had none."""
    if lowered(manifest, target):
        return manifest
    _check_packages(bundle, target)
    with progress.stage(f"lower for {target.name}") as stage:
        graphs = {name: graph.file for name, graph in manifest.graphs.items()}
        files = dict(manifest.files)
        names = [*map(target.file, graphs.values()), target.weights_file]
        with _listed_or_removed(bundle, names):
            for name in target.write(bundle, graphs, static_capacity(manifest)):
                files[name] = describe(bundle / name)
            manifest = dataclasses.replace(manifest, files=files)
            with whole_file(bundle / MANIFEST, BuildError) as partial:
                partial.write_text(manifest.text_form(), encoding="utf-8")
        stage.result = f"*.{target.name}.onnx"
    return manifest


def _check_packages(bundle: Path, target: Target) -> None:
    """BuildError where graphs cannot be lowered here. On a Jetson packages may be missing: such a
    bundle is exported with its target."""
    if missing := [name for name in ("torch", "onnx_ir", "onnxscript") if find_spec(name) is None]:
        raise BuildError(
            f"{bundle} has no graphs for {target.name}, and to make them here needs "
            f"{', '.join(missing)}; {install('export')}, or export it with --target "
            f"{target.name}"
        )


@contextlib.contextmanager
def _listed_or_removed(bundle: Path, names: Sequence[str]) -> Iterator[None]:
    """Files whose making is cut short go again, unless the manifest lists them by then."""
    try:
        yield
    except BaseException:
        listed = read_json(bundle / MANIFEST)["files"]
        for name in names:
            if name not in listed:
                (bundle / name).unlink(missing_ok=True)
        raise
