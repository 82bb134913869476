"""Time of a conversation: a second question, ten turns, a long prompt beside running streams.

    python scripts/make_checkpoint.py --shape 135m -o /tmp/bench/checkpoint
    lvlm-export -m /tmp/bench/checkpoint --max-text-len 8704 -o /tmp/bench/none --no-validate
    python scripts/bench_conversations.py /tmp/bench/none

Prints JSON, times in milliseconds, all of one run: ``second`` the time to the first token of a
second question about an image beside that of the first; ``turns`` new tokens and the time to read
them, turn by turn, beside the whole prompt's; ``long`` the gaps between the tokens of three streams
without a long prompt and with one read in chunks. ``--only`` measures one of these. ``--peak``
reads one long prompt alone, in chunks or as a whole (``--whole``), and tells the most memory it
took. Pieces behind what is there: bench_extend.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from measure_gap import WARM, WORD, gaps, summary

from lvlm.runtime.engine import Engine, Handle

RAW: dict[str, Any] = {"chat_template": False, "ignore_eos": True}
TURN = "And what else is there to be seen, further down, on the left and in the middle? "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of each session (default: ONNX Runtime's)")
    parser.add_argument("--rounds", type=int, default=5, help="questions whose median is taken")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--streams", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=4000, help="of the long prompt")
    parser.add_argument("--quiet-seconds", type=float, default=3.0, help="before the long prompt")
    parser.add_argument("--chunk-tokens", type=int, help="default: by measured time")
    parser.add_argument("--only", choices=list(PARTS), help="default: all of them")
    parser.add_argument("--peak", action="store_true", help="memory of one long prompt alone")
    parser.add_argument("--whole", action="store_true", help="with --peak: not in chunks")
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(args)))
        return
    for name, measure in PARTS.items():
        if args.only in (None, name):
            print(json.dumps({name: measure(args)}), flush=True)


def opened(args: argparse.Namespace, slots: int, chunk: int | None, **more: Any) -> Engine:
    return Engine(
        args.bundle,
        device=args.device,
        threads=args.threads,
        verify="none",
        slots=slots,
        chunk_tokens=chunk,
        **more,
    )


def second_question(args: argparse.Namespace) -> dict[str, Any]:
    """Time to the first token, whose image is new each round."""
    random = np.random.default_rng(0)
    first, second = list[float](), list[float]()
    with opened(args, 2, args.chunk_tokens) as engine:
        token = engine.manifest.images.token
        for _ in range(args.rounds + 1):  # the first one is left out
            image = random.integers(0, 255, (336, 336, 3)).astype(np.uint8)
            for question, times in (("What is in it?", first), ("How many are it?", second)):
                prompt = f"USER: {token}\n{question} ASSISTANT:"
                handle = engine.submit(prompt, [image], max_new_tokens=1, **RAW)
                answer = handle.result()
                times.append((handle.token_times[0] - handle.submitted) * 1e3)
    ours, theirs = (statistics.median(times[1:]) for times in (second, first))
    return {
        "first": round(theirs, 1),
        "second": round(ours, 1),
        "ratio": round(ours / theirs, 3),
        "prompt_tokens": answer.stats.prompt_tokens,
        "reused_tokens": answer.stats.reused_tokens,
    }


def turns(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Turns of one conversation about an image."""
    image = np.random.default_rng(1).integers(0, 255, (336, 336, 3)).astype(np.uint8)
    found = []
    with opened(args, 2, args.chunk_tokens) as engine:
        text = f"USER: {engine.manifest.images.token}\n{TURN}ASSISTANT:"
        for _ in range(args.turns):
            answer = engine.generate(text, [image], max_new_tokens=24, **RAW)
            stats = answer.stats
            found.append(
                {
                    "prompt_tokens": stats.prompt_tokens,
                    "new": stats.prompt_tokens - stats.reused_tokens,
                    "read": round(stats.vision_ms + stats.prefill_ms, 1),
                    "step": round(stats.decode_ms / max(1, stats.decode_steps), 1),
                }
            )
            text += f" {answer.text}\nUSER: {TURN}ASSISTANT:"
    return found


def long_prompt(args: argparse.Namespace) -> dict[str, Any]:
    """Gaps of running streams, and the long prompt's first token, alone and beside them."""
    endless = RAW | {"max_new_tokens": 2000}
    with opened(args, args.streams + 1, args.chunk_tokens, reuse_prefixes=False) as engine:
        per_word = len(engine.tokenizer.encode(WORD * 100)) / 100
        prompt = WORD * round(args.prompt_tokens / per_word)
        began = time.perf_counter()
        engine.generate(prompt, **(endless | {"max_new_tokens": 1}))
        alone = time.perf_counter() - began
        streams = [engine.submit(WORD * (20 + i), **endless) for i in range(args.streams)]
        for stream in streams:
            for _ in zip(range(WARM + 1), stream.tokens(), strict=False):
                pass
        quiet = time.perf_counter()
        time.sleep(args.quiet_seconds)
        asked = time.perf_counter()
        answer = engine.submit(prompt, **(endless | {"max_new_tokens": 1})).result()
        answered = time.perf_counter()
        for stream in streams:  # the gap in which the prompt was read ends with the next token
            finish(stream)
    before, during = (gaps(streams, *span) for span in ((quiet, asked), (asked, answered)))
    return {
        "without": summary(before),
        "with": summary(during),
        "median": round(float(np.median(during) / np.median(before)), 3),
        "prompt_tokens": answer.stats.prompt_tokens,
        "first_token": round((answered - asked) * 1e3),
        "first_token_alone": round(alone * 1e3),
    }


def finish(stream: Handle) -> None:
    """End a stream with its next token."""
    read = len(stream.token_ids)
    while len(stream.token_ids) == read and not stream.done:
        time.sleep(0.001)
    stream.cancel()


def peak(args: argparse.Namespace) -> dict[str, Any]:
    """Megabytes that one long prompt adds to the process."""
    with opened(args, 1, 0 if args.whole else args.chunk_tokens, image_cache=0) as engine:
        engine.generate(WORD, max_new_tokens=1, **RAW)
        per_word = len(engine.tokenizer.encode(WORD * 100)) / 100
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        prompt = WORD * round(args.prompt_tokens / per_word)
        answer = engine.generate(prompt, max_new_tokens=1, **RAW)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "prompt_tokens": answer.stats.prompt_tokens,
        "before": round(before / 1e3),
        "peak": round(after / 1e3),
        "read": round(answer.stats.prefill_ms),
    }


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "second": second_question,
    "turns": turns,
    "long": long_prompt,
}


if __name__ == "__main__":
    main()
