"""The manifest of a bundle, from the plan of the export and what was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lvlm.core.integrity import File, describe
from lvlm.export.checkpoint import checkpoint as checkpoints
from lvlm.export.export_plan import ExportPlan
from lvlm.export.graphs.cache_entries import dtype_beside
from lvlm.runtime.bundle.manifest import (
    SCHEMA,
    Graph,
    Manifest,
    Text,
    Weight,
)

TOOLS = ("lvlm-deploy", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime")


def write_manifest(
    plan: ExportPlan,
    graphs: dict[str, Graph],
    weights: dict[str, Weight],
    folder: Path,
    known: Mapping[str, File],
) -> Manifest:
    """Describe the bundle in ``folder``, as one that nothing was compared with yet.

    Args:
        known: files that need not be read, since they were hashed as they were written.
    """
    manifest = manifest_of(plan, graphs, weights, {**known, **_hash_others(folder, known)})
    manifest.write(folder)
    return manifest


def manifest_of(
    plan: ExportPlan,
    graphs: dict[str, Graph],
    weights: dict[str, Weight],
    files: dict[str, File],
) -> Manifest:
    """The manifest of a bundle with these graphs, weights and files."""
    source = plan.checkpoint.source
    language, prompt = plan.skeleton.language, plan.prompt
    rule, prefix_lm = plan.recipe.cache_rule(), language.bidirectional == "prompt"
    return Manifest(
        schema=SCHEMA,
        family=plan.family.name,
        model={
            "source": Path(source).name if Path(source).is_dir() else source,
            "revision": plan.checkpoint.revision,
            "architecture": checkpoints.describe(plan.checkpoint.config),
            "forms": [form.words for form in plan.checkpoint.forms],
            **({} if plan.calibrated is None else {"calibration": plan.calibrated.record}),
        },
        recipe=plan.recipe.name,
        parameters=plan.recipe.parameters(),
        dtype=dtype_name(plan.dtype),
        cache_dtype=dtype_name(plan.cache_dtype),
        quantization=plan.quantization,
        graphs=graphs,
        weights=weights,
        text=Text(
            layers=len(language.attending),
            heads=language.heads,
            kv_heads=language.kv_heads,
            head_dim=language.head_dim,
            hidden=language.hidden,
            vocab=language.vocab,
            eos_ids=prompt.eos_ids,
            states=language.state_sizes,
            state_dtypes=tuple(
                "float32" if state.exact else dtype_name(dtype_beside(plan.cache_dtype))
                for state in language.states
            ),
            bidirectional=prefix_lm,
        ),
        images=plan.images,
        keep=float(plan.recipe.parameters().get("keep", 1.0)),
        reductions=plan.recipe.reductions(),
        cache_policy=rule.cache_policy if rule else None,
        question_free=plan.recipe.question_free and not prefix_lm,
        encoder=plan.encoder,
        capacity=plan.cache.capacity,
        chat_template=prompt.chat_template,
        special_tokens=prompt.special_tokens,
        validation="skipped",
        tools={name: _version(name) for name in TOOLS},
        files=files,
        generation=prompt.generation,
    )


def record_validation(folder: Path, manifest: Manifest, outcome: dict[str, Any]) -> Manifest:
    """Write ``outcome`` into ``folder``, and into the manifest that there is one."""
    path = folder / "validation.json"
    path.write_text(json.dumps(outcome, indent=1, ensure_ascii=False) + "\n")
    file = describe(path)
    how = "passed, widened to fp32" if manifest.dtype == "bfloat16" else "passed"
    manifest = replace(manifest, validation=how, files={**manifest.files, path.name: file})
    manifest.write(folder)
    return manifest


def dtype_name(dtype: torch.dtype) -> Any:
    """float32 of torch.float32, as manifests have it."""
    return str(dtype).removeprefix("torch.")


def _hash_others(folder: Path, known: Mapping[str, File]) -> dict[str, File]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in known:
            found[name] = describe(path)
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
