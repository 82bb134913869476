"""``lvlm-build engine``: the TensorRT engines of a bundle, for one target."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm.core.console import add_verify

if TYPE_CHECKING:
    from lvlm.export.targets.target import Target
    from lvlm.plugins_trt.engines.engine_plan import EnginePlan
    from lvlm.plugins_trt.engines.engine_request import BuildRequest


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "engine",
        help="engines of a bundle, for one version of TensorRT",
        description="Build the TensorRT engines of a bundle into its folder engines/. For full "
        "TensorRT run it on the machine that is to run them; TensorRT-RTX builds anywhere.",
        epilog="example: lvlm-build engine out/ --target trt-rtx --sm 86,89 --batch 1..8",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, nargs="?", help="folder made by lvlm-export")
    add("--target", metavar="NAME", help="the engine's version and platform; see --list-targets")
    add("--list-targets", action="store_true", help="print what --target takes, and stop")
    add(
        "--sm",
        metavar="N,…",
        help="architectures, for trt-rtx only (default: all it knows); else that of this machine",
    )
    add(
        "--batch",
        metavar="LOW..HIGH",
        help="prompts at once (default 1..4); LOW..USUAL..HIGH says what to tune for",
    )
    add(
        "--max-prompt",
        metavar="N",
        type=int,
        help="tokens of a prompt, image tokens with them (default: all the bundle has room for)",
    )
    add("--workspace", metavar="SIZE", help="memory that building and running may use, as 4GB")
    add(
        "--memory",
        metavar="SIZE",
        help="memory of the device that is meant, as 8GB: is there room?",
    )
    add("--plugins", metavar="FILE", type=Path, help="liblvlm_plugins.so (default: $LVLM_PLUGINS)")
    add(
        "--weights",
        choices=("inputs", "embedded"),
        help="matrices that several engines use: inputs (default) keeps one copy of them on the "
        "device, embedded a copy in every engine",
    )
    add("--version-compatible", action="store_true", help="engines also for later minor versions")
    add("--hardware-compatible", action="store_true", help="engines also for later GPUs")
    add("--timing-cache", metavar="FILE", type=Path, help="read and extend it (default: our own)")
    add("-o", "--output", metavar="FOLDER", type=Path, help="default: BUNDLE/engines/GPU-VERSION")
    add_verify(add)
    add("--force", action="store_true", help="replace engines that are there")
    add(
        "--validate",
        action="store_true",
        help="run them on this machine, and compare with answers that the export recorded; engines "
        "that are there already are not built again without --force",
    )
    add(
        "--dry-run",
        action="store_true",
        help="check everything, print the plan and what it "
        "takes, build nothing; also for a machine that is elsewhere",
    )
    add("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lvlm.core.errors import ParameterError
    from lvlm.plugins_trt.engines import engine_listing

    if args.list_targets:
        print(engine_listing.targets())
        return 0
    if args.bundle is None:
        raise ParameterError("which bundle? give the folder that lvlm-export made")
    request = _request(args)

    from lvlm.core.progress import Progress
    from lvlm.export.packages import check_installed

    check_installed(["onnx"], "build")

    from lvlm.plugins_trt.engines import engine_builder
    from lvlm.plugins_trt.engines.engine_plan import make_plan

    if args.validate and (status := _recorded(request, args)) is not None:
        return status
    if not request.target.built:
        print(engine_builder.lower_only(request, Progress(1, quiet=args.quiet), args.dry_run))
        return _answers(request) if args.validate else 0
    plan = make_plan(request, dry_run=args.dry_run)
    if args.dry_run:
        print(engine_listing.plan(plan))
        return 0
    if args.validate and plan.gpu is None:
        raise ParameterError(
            "--validate runs the engines, and there is no GPU here: leave it out, and give it on "
            "the machine that is meant"
        )
    status = _built(plan, args.quiet)
    return _answers(request, plan.folder) if args.validate and not status else status


def _recorded(request: BuildRequest, args: argparse.Namespace) -> int | None:
    """Say what is known of --validate before anything is built; the status, if it is done."""
    from lvlm.core.errors import ParameterError
    from lvlm.plugins_trt.engines.engine_answers import check_limits
    from lvlm.runtime.bundle.engine_sets import EngineSet, NoEnginesError
    from lvlm.runtime.bundle.reader import read_bundle
    from lvlm.runtime.tools.recorded_answers import recorded_answers

    if args.dry_run:
        raise ParameterError("--validate runs what was built, and --dry-run builds nothing")
    if args.output is not None:
        raise ParameterError("--validate runs the engines in BUNDLE/engines; leave -o out")
    manifest = read_bundle(request.bundle, request.verify)
    answers = recorded_answers(request.bundle, manifest)
    if not request.target.built:
        return None
    check_limits(request.limits, manifest, answers)
    if args.force:
        return None
    try:
        found = EngineSet.find(request.bundle, request.target.flavour)
    except NoEnginesError:
        return None
    there = any(engines.target == request.target.name for engines in found)
    return _answers(request) if there else None


def _answers(request: BuildRequest, built: Path | None = None) -> int:
    from lvlm.core.own_process import in_own_process
    from lvlm.plugins_trt.engines.engine_answers import check_answers, device_of

    device = device_of(request.target)
    return in_own_process("lvlm-build", check_answers, request.bundle, device, built)


def _built(plan: EnginePlan, quiet: bool) -> int:
    from lvlm.core.errors import BuildError
    from lvlm.core.output import remove_abandoned
    from lvlm.core.own_process import in_own_process
    from lvlm.plugins_trt.engines import engine_listing

    try:
        return in_own_process("lvlm-build", build, plan, quiet)
    except BuildError as error:
        raise BuildError(
            f"{engine_listing.PEOPLE[plan.request.target.flavour]} {plan.version} crashed while it "
            f"built an engine: {error}; other settings of the recipe or another --target may "
            "build (docs/tensorrt.md, Known faults)"
        ) from None
    finally:
        remove_abandoned(plan.folder)


def build(plan: EnginePlan, quiet: bool) -> None:
    """The engines of a plan, with progress, and what was made in the end."""
    from lvlm.core.progress import Progress
    from lvlm.plugins_trt.engines import engine_builder, engine_listing

    progress = Progress(engine_builder.stages(plan), quiet=quiet)
    print(engine_listing.result(engine_builder.build(plan, progress)))


def _request(args: argparse.Namespace) -> BuildRequest:
    from lvlm.plugins_trt.engines.engine_request import (
        BuildRequest,
        parse_architectures,
        parse_size,
    )

    return BuildRequest(
        bundle=args.bundle,
        target=_target(args.target),
        sm=None if args.sm is None else parse_architectures(args.sm),
        batch=args.batch,
        max_prompt=args.max_prompt,
        workspace=None if args.workspace is None else parse_size(args.workspace),
        plugins=args.plugins,
        weights=args.weights,
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible,
        timing_cache=args.timing_cache,
        output=args.output,
        force=args.force,
        verify=args.verify,
        memory=None if args.memory is None else parse_size(args.memory, "--memory"),
    )


def _target(name: str | None) -> Target:
    from lvlm.core.discovery import discover, nearest
    from lvlm.core.errors import ParameterError

    known: dict[str, Target] = discover("lvlm.export.targets", "TARGET")
    if name is None:
        raise ParameterError(f"for what? give --target, one of {', '.join(sorted(known))}")
    if name not in known:
        raise nearest("target", name, known)
    return known[name]
