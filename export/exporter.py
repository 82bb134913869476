"""From a checkpoint and a recipe to a bundle: trace, stream the weights, check, rename."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lvlm.export import checkpoint as checkpoints
from lvlm.export import weights
from lvlm.export.families._base import Family
from lvlm.export.graphs import GRAPHS, trace_graph
from lvlm.export.progress import Progress, size
from lvlm.export.recipes._base import Recipe
from lvlm.export.skeleton import build_skeleton
from lvlm.export.targets._base import Target
from lvlm.export.tracing import TracedGraph
from lvlm.runtime.bundle import (
    SCHEMA,
    Capacity,
    File,
    Graph,
    Images,
    Manifest,
    Text,
)
from lvlm.runtime.errors import ExportError, ParameterError
from lvlm.runtime.integrity import sha256_of
from lvlm.runtime.schedule import keep_ratios, tokens_per_layer

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOOLS = ("lvlm-deploy", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime")


@dataclass(frozen=True)
class Options:
    """What to export. ``dtype`` None: as the checkpoint has it (its config.json)."""

    model: str
    recipe: Recipe
    output: Path
    dtype: str | None = None
    revision: str | None = None
    max_text_len: int = 2048
    max_images: int = 1
    validate: bool = True
    targets: tuple[Target, ...] = ()
    # Set by validation only: the fp32 twin of a bf16 bundle holds weights rounded to bf16.
    rounding: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("max_text_len", "max_images"):
            if getattr(self, name) < 1:
                raise ParameterError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; give 1 or more"
                )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ParameterError(f"--dtype {self.dtype}: give one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Plan:
    """Everything known before any work: what ``--dry-run`` prints."""

    options: Options
    checkpoint: checkpoints.Checkpoint
    family: Family
    config: Any
    dtype: torch.dtype
    images: Images
    recipe: Recipe
    stored_names: dict[str, str]
    weight_bytes: int
    per_layer_image_tokens: list[int]
    capacity: Capacity
    cache_bytes: int
    peak_bytes: int


@dataclass
class Report:
    """What an export did."""

    output: Path
    manifest: Manifest
    seconds: float
    validation: list[Any] = field(default_factory=list)


def make_plan(options: Options) -> Plan:
    """Resolve and check everything that can be checked without tracing."""
    checkpoint = checkpoints.resolve(options.model, options.revision)
    family = checkpoints.find_family(checkpoint.config, checkpoint.source)
    config = family.read_config(checkpoint.config)
    dtype = DTYPES[options.dtype] if options.dtype else _stored_dtype(checkpoint.config)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    skeleton = build_skeleton(family, config, dtype, mode)
    language = family.language(skeleton, config)
    layers = len(language.blocks)
    recipe = options.recipe.for_layers(layers)
    images = family.images(config, checkpoint.folder)
    stored_names = checkpoints.match_weights(checkpoint, family, skeleton)
    keep = float(recipe.parameters().get("keep", 1.0))
    reductions = recipe.reductions()
    ratios = keep_ratios(reductions, keep, None)
    entering = tokens_per_layer(reductions, ratios, images.tokens, layers)
    per_layer = tuple(options.max_text_len + options.max_images * n for n in entering)
    longest = options.max_text_len + options.max_images * images.tokens
    if language.window is not None and language.window < longest:
        raise ParameterError(
            f"this model attends over {language.window} tokens only; lower --max-text-len to "
            f"{language.window - options.max_images * images.tokens} or less"
        )
    unique = {id(p): p for p in skeleton.parameters()}.values()
    weight_bytes = sum(p.numel() for p in unique) * dtype.itemsize
    largest = max(p.numel() for p in unique)
    entry = 2 * language.kv_heads * language.head_dim * dtype.itemsize
    return Plan(
        options=options,
        checkpoint=checkpoint,
        family=family,
        config=config,
        dtype=dtype,
        images=images,
        recipe=recipe,
        stored_names=stored_names,
        weight_bytes=weight_bytes,
        per_layer_image_tokens=entering,
        capacity=Capacity(options.max_text_len, options.max_images, per_layer),
        cache_bytes=sum(per_layer) * entry,
        peak_bytes=_peak_estimate(options, weight_bytes, largest, len(list(unique))),
    )


def _stored_dtype(config: dict[str, Any]) -> torch.dtype:
    named = config.get("dtype") or config.get("torch_dtype")
    named = named or config.get("text_config", {}).get("dtype")
    named = named or config.get("text_config", {}).get("torch_dtype") or "float32"
    dtype = getattr(torch, str(named), None)
    if dtype not in DTYPES.values():
        raise ParameterError(f"config.json says dtype {named}; choose one with --dtype")
    assert isinstance(dtype, torch.dtype)
    return dtype


def _peak_estimate(options: Options, weight_bytes: int, largest: int, tensors: int) -> int:
    """Libraries and traced graphs, and a few copies of the largest tensor in fp32; validation also
    loads the model in fp32 and the bundle (figures behind this: docs/measurements.md)."""
    base = 900_000_000 + 700_000 * tensors + 4 * 4 * largest
    return base + (5 * weight_bytes if options.validate else 0)


def export(plan: Plan, progress: Progress) -> Report:
    """Write the bundle; nothing is left in its place if any step fails."""
    output = plan.options.output
    check_output(output)
    _check_disk(plan)
    with _temporary_sibling(output) as folder:
        manifest = write_bundle(plan, folder, progress)
        report = Report(output, manifest, progress.elapsed)
        if plan.options.validate:
            from lvlm.export.validation import validate

            with progress.stage("compare with the checkpoint on a picture") as stage:
                report.validation = validate(plan, folder)
                stage.result = f"{len(report.validation)} checks passed"
            manifest = _record_validation(folder, manifest, report.validation)
        os.replace(folder, output)
    return replace(report, manifest=manifest, seconds=progress.elapsed)


def stages(options: Options) -> int:
    return len(GRAPHS) + 2 + len(options.targets) + options.validate


def check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"{output} exists and is not empty; give another -o or remove it")
    if not output.absolute().parent.is_dir():
        raise ExportError(f"the folder {output.absolute().parent} does not exist; make it first")


def _check_disk(plan: Plan) -> None:
    free = shutil.disk_usage(plan.options.output.absolute().parent).free
    twin = 2 * plan.weight_bytes if plan.options.validate and plan.dtype == torch.bfloat16 else 0
    needed = plan.weight_bytes + twin + 50_000_000
    if free < needed:
        raise ExportError(
            f"the bundle needs {size(needed)}, the disk has {size(free)} free; "
            "free some or give -o on another disk"
        )


@contextlib.contextmanager
def _temporary_sibling(output: Path) -> Iterator[Path]:
    """A folder beside ``output``; removed unless it was renamed. Those of dead exports go too."""
    parent, prefix = output.absolute().parent, f".{output.name}.partial-"
    for old in parent.glob(prefix + "*"):
        pid = old.name.removeprefix(prefix)
        if not (pid.isdigit() and Path(f"/proc/{pid}").exists()):
            shutil.rmtree(old, ignore_errors=True)
    folder = parent / f"{prefix}{os.getpid()}"
    try:
        folder.mkdir()
        yield folder
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_bundle(plan: Plan, folder: Path, progress: Progress) -> Manifest:
    """Everything of a bundle into an existing folder, unchecked."""
    graphs = _trace_all(plan, progress)
    transposed = weights.fold_transposes(graphs)
    entries = weights.plan(graphs, transposed, plan.dtype)
    weights.attach(graphs, entries, plan.dtype)
    files: dict[str, File] = {}
    total = sum(e.nbytes for e in entries)
    with progress.stage("copy weights") as stage:
        files[weights.WEIGHTS] = weights.write(
            folder / weights.WEIGHTS,
            entries,
            plan.checkpoint,
            plan.stored_names,
            plan.dtype,
            lambda n: stage.add_bytes(n, total),
            plan.options.rounding,
        )
        stage.result = size(total)
    with progress.stage("write graphs, tokenizer and manifest") as stage:
        described = {}
        for graph in graphs:
            inputs, outputs = graph.ports()
            described[graph.name] = Graph(f"{graph.name}.onnx", inputs, outputs)
            ir.save(graph.model, folder / f"{graph.name}.onnx")
        prompt = plan.family.prompt(plan.config, plan.checkpoint.folder)
        for name in prompt.files:
            shutil.copyfile(plan.checkpoint.folder / name, folder / name)
        stage.result = f"{len(graphs)} graphs"
    for target in plan.options.targets:
        with progress.stage(f"lower for {target.name}") as stage:
            target.write(folder, {name: g.file for name, g in described.items()}, plan.capacity)
            stage.result = f"*.{target.name}.onnx"
    language = plan.family.language(_skeleton(plan), plan.config)
    manifest = Manifest(
        schema=SCHEMA,
        family=plan.family.name,
        model={
            "source": Path(plan.checkpoint.source).name
            if Path(plan.checkpoint.source).is_dir()
            else plan.checkpoint.source,
            "revision": plan.checkpoint.revision,
            "architecture": checkpoints.describe(plan.checkpoint.config),
        },
        recipe=plan.recipe.name,
        parameters=plan.recipe.parameters(),
        dtype=_name(plan.dtype),
        graphs=described,
        text=Text(
            layers=len(language.blocks),
            heads=language.heads,
            kv_heads=language.kv_heads,
            head_dim=language.head_dim,
            hidden=language.hidden,
            vocab=language.vocab,
            eos_ids=prompt.eos_ids,
        ),
        images=plan.images,
        keep=float(plan.recipe.parameters().get("keep", 1.0)),
        reductions=plan.recipe.reductions(),
        capacity=plan.capacity,
        chat_template=prompt.chat_template,
        special_tokens=prompt.special_tokens,
        validation="skipped",
        tools={name: _version(name) for name in TOOLS},
        files=files | _hash_others(folder, files),
    )
    manifest.write(folder)
    return manifest


def _skeleton(plan: Plan) -> Any:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return build_skeleton(plan.family, plan.config, plan.dtype, mode)


def _trace_all(plan: Plan, progress: Progress) -> list[TracedGraph]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = build_skeleton(plan.family, plan.config, plan.dtype, mode)
    language = plan.family.language(model, plan.config)
    vision = plan.family.vision(model, plan.config)
    graphs = []
    for name in GRAPHS:
        with progress.stage(f"trace {name}") as stage:
            graph = trace_graph(
                name, model, vision, language, plan.recipe, plan.images, plan.dtype, mode
            )
            stage.result = f"{len(graph.model.graph):,} nodes"
            graphs.append(graph)
    return graphs


def _hash_others(folder: Path, known: dict[str, File]) -> dict[str, File]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in known:
            found[name] = File(sha256_of(path), path.stat().st_size)
    return found


def _record_validation(folder: Path, manifest: Manifest, checks: list[Any]) -> Manifest:
    import json

    path = folder / "validation.json"
    path.write_text(json.dumps([asdict(c) for c in checks], indent=1) + "\n")
    file = File(sha256_of(path), path.stat().st_size)
    twin = "passed on its fp32 twin" if manifest.dtype == "bfloat16" else "passed"
    manifest = replace(manifest, validation=twin, files={**manifest.files, path.name: file})
    manifest.write(folder)
    return manifest


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
