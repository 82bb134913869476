"""``lvlm-build triton``: a model repository for NVIDIA's Triton Inference Server."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from lvlm.core.console import add_verify
from lvlm.runtime.server.triton_server.model_settings import Settings


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "triton",
        help="a model repository for Triton Inference Server",
        description="Write a bundle as a model of NVIDIA's Triton Inference Server: a folder that "
        "its Python backend loads, with one engine for all requests. Flags from --device on are "
        "kept as parameters in its config.pbtxt, where they can be changed.",
        epilog="example: lvlm-build triton out/ -o model_repository/",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, help="a folder made by lvlm-export")
    add("-o", "--output", metavar="FOLDER", type=Path, required=True,
        help="the repository; the model is a folder in it, beside others")  # fmt: skip
    add("--name", help="what clients ask for (default: the name of BUNDLE)")
    add(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="a Jinja template in place of the bundle's, as one that has a place for tools",
    )
    add("--link", action="store_true", help="link to BUNDLE, in place of a copy")
    for each in fields(Settings):
        if "help" in each.metadata:
            told = each.metadata["help"]
            add(
                "--" + each.name.replace("_", "-"),
                type=each.metadata["kind"],
                metavar=each.metadata["metavar"],
                default=each.default,
                help=told if each.default is None else f"{told} (default {each.default})",
            )
    add_verify(add)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lvlm.runtime.bundle.reader import read_bundle
    from lvlm.runtime.engine.memory_plan import in_mb
    from lvlm.runtime.options.generation_options import GenerationOptions
    from lvlm.runtime.options.option_flags import read_text
    from lvlm.runtime.server.triton_server.repository import TEMPLATE, model_name, write_model

    given = {x.name: getattr(args, x.name) for x in fields(Settings) if "help" in x.metadata}
    template = ""
    if args.chat_template is not None:
        template = read_text("chat_template", args.chat_template)
        GenerationOptions(chat_template=template)  # a mistake shows here
        given["chat_template"] = TEMPLATE
    settings = Settings(**given)
    name = model_name(args.bundle, args.name)
    plan = settings.plan(read_bundle(args.bundle, args.verify))
    folder = write_model(
        args.output, name, args.bundle, settings, template=template, link=args.link
    )
    print(f"{folder}: {plan.slots} slots on {settings.device}, {in_mb(plan.total)} at most")
    print(f"next: tritonserver --model-repository {args.output}")
    return 0
