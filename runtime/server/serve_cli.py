"""``lvlm-serve``: bundles as a service, by OpenAI's API."""

from __future__ import annotations

import argparse
import ipaddress
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm.core.console import Parser, add_verify, run_main
from lvlm.core.errors import ParameterError
from lvlm.core.installing import install, require
from lvlm.core.opening import at_once
from lvlm.runtime.backends import devices

if TYPE_CHECKING:
    from lvlm.runtime.engine import Engine

NEEDED = ("fastapi", "uvicorn", "httptools", "prometheus_client")
POSITIVE = (
    *("drain", "media_seconds", "body_seconds"),
    *("media_bytes", "media_pixels", "body_bytes"),
)
LONGEST_KEYS = 1_000_000  # characters of a file of keys


def main(argv: Sequence[str] | None = None) -> int:
    return run_main("lvlm-serve", lambda: _run(make_parser().parse_args(argv)))


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lvlm-serve",
        description="Serve bundles over HTTP, as OpenAI's clients ask: chat completions with "
        "images, streams, JSON by a schema; a page to try it at /, metrics at /metrics.",
        epilog="example: lvlm-serve out/ --port 8000",
    )
    add = parser.add_argument
    add(
        "bundles",
        metavar="BUNDLE",
        nargs="+",
        help="a folder made by lvlm-export, served by its name; NAME=FOLDER names it otherwise",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    add("--port", type=int, default=8000, metavar="N", help="default 8000; 0: any that is free")
    add("--device", default="cpu", help=f"what to run on: {', '.join(devices())} (default cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: the backend's choice)")
    add("--slots", type=int, metavar="N", help="requests that are answered at once (default 4)")
    add("--memory-budget", metavar="SIZE", help="as many slots as fit, as 2GB")
    add("--max-text-len", type=int, metavar="N", help="shorter prompts and answers: smaller slots")
    add("--max-images", type=int, metavar="N", help="images of a prompt (default: as exported)")
    add(
        "--keep", type=float, metavar="R", help="image tokens to keep, where a request says nothing"
    )
    add("--kv-keep", type=float, metavar="G", help="cache entries to keep, likewise")
    add(
        "--defaults",
        choices=("model",),
        help="draw as the checkpoint's generation_config.json says, where a request says nothing "
        "(default: temperature 0)",
    )
    add(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="a Jinja template in place of the bundles' own, as one that has a place for tools",
    )
    add("--queue", type=int, default=256, metavar="N", help="requests that may wait (default 256)")
    add(
        "--image-cache",
        default="64MB",
        metavar="SIZE",
        help="features of images that are kept (64MB)",
    )
    add(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="a key that clients have to send; repeatable; @FILE reads one per line",
    )
    add(
        "--allow-media-domain",
        action="append",
        default=[],
        metavar="HOST",
        help="get images by http from this host; repeatable (default: from nowhere)",
    )
    add(
        "--allow-media-path",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="take file:// URLs of files in this folder; repeatable (default: none)",
    )
    media = parser.add_argument_group("limits")
    limit = media.add_argument
    limit("--media-bytes", type=int, default=32 << 20, metavar="N",
          help="bytes of an image or a video (default 32 MiB)")  # fmt: skip
    limit("--media-pixels", type=int, default=32_000_000, metavar="N",
          help="pixels of an image (default 32 million)")  # fmt: skip
    limit("--media-seconds", type=float, default=10, metavar="S",
          help="seconds to get an image from its host in (default 10)")  # fmt: skip
    limit("--body-bytes", type=int, default=64 << 20, metavar="N",
          help="bytes of a request (default 64 MiB)")  # fmt: skip
    limit("--body-seconds", type=float, default=60, metavar="S",
          help="seconds that a client may take to send one (default 60)")  # fmt: skip
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="pages that may ask from a browser; repeatable (default: the server's own only)",
    )
    add("--certificate", metavar="FILE", help="TLS: the certificate's chain, PEM")
    add("--certificate-key", metavar="FILE", help="TLS: its key, PEM")
    add("--drain", type=float, default=30, metavar="S", help="to finish answers in at the end (30)")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    add_verify(add)
    return parser


def _run(args: argparse.Namespace) -> int:
    for module in NEEDED:
        require(module, install("serve"))
    keys = read_keys(args.api_key, "--api-key")
    if (args.certificate is None) != (args.certificate_key is None):
        raise ParameterError("--certificate and --certificate-key belong together; give both")
    for name in POSITIVE:
        if not getattr(args, name) > 0:
            flag = name.replace("_", "-")
            raise ParameterError(f"--{flag} is {getattr(args, name)}; give a number above 0")
    folders = _names(args.bundles)

    from lvlm.runtime.engine.aio import AsyncEngine
    from lvlm.runtime.options.generation_options import GenerationOptions
    from lvlm.runtime.options.option_flags import read_text
    from lvlm.runtime.server.app import Limits, make_app
    from lvlm.runtime.server.media.media_reader import MediaReader
    from lvlm.runtime.server.media.media_rules import MediaRules
    from lvlm.runtime.server.running import (
        check_certificate,
        configuration,
        listen,
        serve,
        set_logging,
    )
    from lvlm.runtime.server.service import Served, Service

    rules = MediaRules(
        tuple(args.allow_media_domain),
        tuple(args.allow_media_path),
        args.media_bytes,
        args.media_seconds,
    )
    reader = MediaReader(rules)
    usual: dict[str, Any] = {"max_image_pixels": args.media_pixels}
    usual |= {} if args.defaults is None else {"defaults": args.defaults}
    if args.chat_template is not None:
        usual["chat_template"] = read_text("chat_template", args.chat_template)
    GenerationOptions(**usual)  # a mistake shows here
    if args.certificate is not None:
        check_certificate(args.certificate, args.certificate_key)
    with ExitStack() as stack:
        place = stack.enter_context(listen(args.host, args.port))
        engines = {n: stack.enter_context(_open(f, args)) for n, f in folders.items()}
        models = [Served(name, AsyncEngine(engine), usual) for name, engine in engines.items()]
        for model in models:
            model.skill  # noqa: B018 - a mistake in a chat template shows here
        service = Service(models, reader.read)
        limits = Limits(keys, args.body_bytes, args.body_seconds, args.allow_origin)
        set_logging(args.log_level)
        scheme = "http" if args.certificate is None else "https"
        host, port = place.getsockname()[:2]
        every = ipaddress.ip_address(host).is_unspecified
        shown = "localhost" if every else f"[{host}]" if ":" in host else host
        if not keys and not ipaddress.ip_address(host).is_loopback:
            print(
                "lvlm-serve: note: anybody who reaches this address may ask; --api-key sets a key",
                file=sys.stderr,
            )
        print(f"{', '.join(folders)} at {scheme}://{shown}:{port}", file=sys.stderr, flush=True)
        config = configuration(make_app(service, limits), args.certificate, args.certificate_key)
        serve(config, service, place, args.drain)
    return 0


def _open(folder: Path, args: argparse.Namespace) -> Engine:
    from lvlm.runtime.engine import Engine

    return Engine(
        folder,
        device=args.device,
        threads=args.threads,
        verify=args.verify,
        slots=args.slots,
        memory_budget=args.memory_budget,
        max_text_len=args.max_text_len,
        max_images=args.max_images,
        keep=args.keep,
        kv_keep=args.kv_keep,
        queue_limit=args.queue,
        image_cache=args.image_cache,
    )


def _names(bundles: Sequence[str]) -> dict[str, Path]:
    """Folders by the names that clients use. Raises ParameterError."""
    found: dict[str, Path] = {}
    for given in bundles:
        name, equals, rest = given.partition("=")
        path = Path(rest) if equals and not Path(given).exists() else Path(given)
        name = name if path == Path(rest) and equals else path.resolve().name
        if not name:
            raise ParameterError(f"{given}: name the bundle, as NAME=FOLDER")
        if name in found:
            raise ParameterError(f"two bundles are named {name}; give one as NAME=FOLDER")
        found[name] = path
    return found


def read_keys(given: Sequence[str], where: str) -> list[str]:
    """Keys as they are, or those of an @FILE: one on each line. Raises ParameterError, which names
    ``where`` they were given."""
    return [key for one in given for key in _keys(one, where)]


def _keys(given: str, where: str) -> list[str]:
    keys: Any = [given]
    if given.startswith("@"):
        try:
            with open(given[1:], encoding="utf-8", opener=at_once) as file:
                keys = file.read(LONGEST_KEYS).split()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
            raise ParameterError(f"{where} {given}: {reason}") from None
    if not keys or not all(key.strip() for key in keys):
        raise ParameterError(f"{where} is empty; give a key, or @FILE with one per line")
    return list(keys)
