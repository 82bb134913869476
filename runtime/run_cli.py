"""``lvlm-run``: ask a bundle a question about images."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvlm.core.console import Parser, add_verify, run_main
from lvlm.core.errors import ParameterError, PromptError
from lvlm.core.output import check_place, whole_file
from lvlm.runtime.backends import devices
from lvlm.runtime.options.generation_options import GenerationOptions
from lvlm.runtime.options.option_flags import add_option_flags, given_options

if TYPE_CHECKING:
    from lvlm.runtime.engine import Engine
    from lvlm.runtime.generate.answers import Generation, Stats
    from lvlm.runtime.model import Model

LONGEST_PROMPT = 10_000_000  # characters: a pipe might never end
DRAWING = ("top_k", "top_p", "min_p", "n", "seed")  # without effect at temperature 0


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    return run_main("lvlm-run", lambda: _run(make_parser("--chat" in given).parse_args(argv)))


def make_parser(chat: bool = False) -> argparse.ArgumentParser:
    parser = Parser(
        prog="lvlm-run",
        description="Ask a bundle a question about images; the answer is printed as it comes.",
        epilog='example: lvlm-run out/ --image cat.jpg "What is in the picture?"',
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, help="folder made by lvlm-export")
    if not chat:  # not an optional one: argparse would miss it behind flags
        add("prompt", metavar="PROMPT", help="the question; - reads it from standard input")
    add(
        "--chat",
        action="store_true",
        help="a conversation, in place of PROMPT; /help in it lists its commands",
    )
    add(
        "--session",
        action="store_true",
        help="with --chat: keep the compressed cache from turn to turn (bundles exported with "
        "--sessions)",
    )
    add("--image", action="append", default=[], metavar="PATH", help="an image; repeatable")
    add("--video", action="append", default=[], metavar="PATH", help="a video; repeatable")
    add("--device", default="cpu", help=f"what to run on: {', '.join(devices())} (default cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: the backend's choice)")
    add_option_flags(parser)
    add(
        "--show-merge",
        type=Path,
        metavar="OUT.png",
        help="draw which patches were kept, merged and dropped",
    )
    add("--stats", action="store_true", help="tokens, times and cache sizes on standard error")
    add("--json", action="store_true", help="one JSON object, printed at the end")
    add_verify(add)
    talk = parser.add_mutually_exclusive_group()
    talk.add_argument("-v", "--verbose", action="store_true", help="say what was loaded")
    talk.add_argument("-q", "--quiet", action="store_true", help="no notes on standard error")
    return parser


def _run(args: argparse.Namespace) -> int:
    options = _check(args)
    if args.chat:
        return _chat(args, options)
    prompt = _prompt(args.prompt)

    from lvlm.runtime.model import load

    began = time.perf_counter()
    with load(args.bundle, device=args.device, threads=args.threads, verify=args.verify) as model:
        if args.verbose:
            _describe(model, args, time.perf_counter() - began)
        if args.show_merge:
            from lvlm.runtime.tools.show_merge import check_shows

            check_shows(model.manifest)
        answer = _answer(model, prompt, args, options)
        if args.show_merge:
            _save_image(model, answer, args)
    cut = _cut_short(model, answer)
    if args.json:
        print(json.dumps(_data(answer), ensure_ascii=False))
    if args.stats:
        print(_table(answer, cut), file=sys.stderr)
    elif cut and not args.quiet:
        print(f"lvlm-run: note: {cut}", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> GenerationOptions:
    """Raise for mistakes that are known before anything is loaded."""
    options = given_options(args)
    if args.session and not args.chat:
        raise ParameterError("--session is for conversations; add --chat")
    if args.chat and options.n > 1:
        raise ParameterError("--n does not go with --chat; leave it out")
    idle = [name for name in DRAWING if getattr(args, name) is not None]
    if idle and not options.temperature and (options.temperature == 0 or not options.defaults):
        flag = "--" + idle[0].replace("_", "-")
        raise ParameterError(f"{flag} has no effect at temperature 0; add --temperature 0.7, say")
    for flag in ("json", "show_merge", "no_chat_template") if args.chat else ():
        if getattr(args, flag):
            raise ParameterError(
                f"--{flag.replace('_', '-')} does not go with --chat; leave it out"
            )
    if args.logprobs is not None and not args.json:
        raise ParameterError("--logprobs is part of --json's output; add --json")
    if args.show_merge is not None:
        if args.video:
            raise ParameterError("--show-merge draws on images, not on videos; leave it out")
        if not args.image:
            raise ParameterError("--show-merge draws on an image; give one with --image")
        if args.show_merge.suffix.lower() != ".png":
            raise ParameterError(f"--show-merge {args.show_merge}: name a file ending in .png")
        check_place("--show-merge", args.show_merge, ParameterError)
    return options


def _chat(args: argparse.Namespace, options: GenerationOptions) -> int:
    from lvlm.runtime.engine import Engine
    from lvlm.runtime.tools.chat import Chat, converse

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def note(text: str) -> None:
        if args.stats or not args.quiet:
            tell(f"[{text}]")

    began = time.perf_counter()
    with Engine(
        args.bundle,
        device=args.device,
        threads=args.threads,
        verify=args.verify,
        slots=1,
        keep=options.keep,
        kv_keep=options.kv_keep,
    ) as engine:
        if args.verbose:
            _describe(engine, args, time.perf_counter() - began)
        say = partial(print, end="", flush=True)
        chat = Chat(engine, options, say, note, tell, stats=args.stats, session=args.session)
        for kind, paths in (("image", args.image), ("video", args.video)):
            for path in paths:
                chat.show(kind, path)
        return converse(chat)


def _prompt(given: str) -> str:
    if given != "-":
        return given
    try:
        text = sys.stdin.read(LONGEST_PROMPT + 1)
    except UnicodeDecodeError:
        raise PromptError("standard input is not valid text; pass UTF-8") from None
    if len(text) > LONGEST_PROMPT:
        raise PromptError(f"standard input has over {LONGEST_PROMPT:,} characters; give a question")
    return text.removesuffix("\n")


def _answer(
    model: Model, prompt: str, args: argparse.Namespace, options: GenerationOptions
) -> Generation:
    if options.n > 1:
        answer: Generation = model.generate(prompt, args.image, args.video, options)
        for number, one in enumerate((answer, *answer.others), 1):
            if not args.json:
                print(f"[{number}] {one.text}")
        return answer
    stream = model.stream(prompt, args.image, args.video, options)
    started = False
    try:
        for piece in stream:
            if not args.json:
                started = True
                print(piece, end="", flush=True)
    finally:
        stream.close()
        if started:
            print(flush=True)
    assert stream.result is not None
    return stream.result


def _save_image(model: Model, answer: Generation, args: argparse.Namespace) -> None:
    from lvlm.runtime.tools.show_merge import merge_image

    image = merge_image(model, args.image, answer)
    with whole_file(args.show_merge, ParameterError) as partial:
        image.save(partial, "PNG")
    if not args.quiet:
        print(f"lvlm-run: wrote {args.show_merge}", file=sys.stderr)


def _describe(model: Model | Engine, args: argparse.Namespace, seconds: float) -> None:
    manifest = model.manifest
    source = manifest.model.get("source", "?")
    parameters = ", ".join(f"{k}={v}" for k, v in manifest.parameters.items() if v is not None)
    capacity = manifest.capacity
    print(
        f"{args.bundle}: {source} ({manifest.family}, {manifest.dtype}), recipe {manifest.recipe}"
        f"{f' ({parameters})' if parameters else ''}; up to {capacity.max_text_len} text tokens "
        f"and {capacity.max_images} image(s); loaded on {args.device} in {seconds:.1f} s",
        file=sys.stderr,
    )


def _cut_short(model: Model, answer: Generation) -> str | None:
    """Reason why the answer ended neither by itself nor at --max-new-tokens; None if it did."""
    if not answer.capacity_reached:
        return None
    stats, limit = answer.stats, model.manifest.capacity.max_text_len
    if stats.prompt_tokens - stats.image_tokens + stats.new_tokens >= limit:
        return (
            f"the answer was cut at {stats.new_tokens} tokens: the bundle holds {limit} text "
            "tokens of prompt and answer (export with a larger --max-text-len)"
        )
    return (
        f"the answer was cut at {stats.new_tokens} tokens: at these ratios the bundle's cache is "
        "full (lower --keep or --kv-keep, or export with larger ones)"
    )


def _table(answer: Generation, cut: str | None) -> str:
    stats = answer.stats
    counts = stats.image_tokens_per_layer
    steps = [i for i in range(len(counts)) if i == 0 or counts[i] != counts[i - 1]]
    pyramid = " → ".join(f"{counts[i]} from block {i}" if i else str(counts[i]) for i in steps)
    rows = {
        "prompt tokens": f"{stats.prompt_tokens} ({stats.image_tokens} of them image tokens)",
        "image tokens": pyramid,
        "cache entries": _kept(stats),
        "vision": f"{stats.vision_ms:.1f} ms",
        "prefill": f"{stats.prefill_ms:.1f} ms",
        "decode": f"{stats.decode_tokens_per_second:.1f} tokens/s ({stats.decode_steps} steps)",
        "new tokens": str(stats.new_tokens),
        "finished by": _ending(answer) + (f": {cut}" if cut else ""),
        "cache allocated": f"{stats.cache_bytes_allocated:,} bytes",
        "cache used": f"{stats.cache_bytes_used:,} bytes",
    }
    width = max(map(len, rows))
    return "\n".join(f"  {name:{width}}  {value}" for name, value in rows.items())


def _ending(answer: Generation) -> str:
    which = answer.stop_reason
    if which is None:
        return answer.finish_reason
    return f"stop at token {which}" if isinstance(which, int) else f"stop at {which!r}"


def _kept(stats: Stats) -> str:
    """Part of the prompt that each layer's cache keeps, of what entered its block."""
    low, high = min(stats.kept_per_layer), max(stats.kept_per_layer)
    layers = f"{low} to {high} per layer" if low < high else f"{low} in each layer"
    share = sum(stats.kept_per_layer) / sum(stats.tokens_per_layer)
    return f"{layers} after prefill ({share:.0%} of the tokens that entered)"


def _data(answer: Generation) -> dict[str, Any]:
    speed = answer.stats.decode_tokens_per_second
    scores = [dataclasses.asdict(score) for score in answer.scores]
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        **({"logprobs": scores} if scores else {}),
        **({"others": list(map(_data, answer.others))} if answer.others else {}),
        "stats": dataclasses.asdict(answer.stats) | {"decode_tokens_per_second": speed},
    }
