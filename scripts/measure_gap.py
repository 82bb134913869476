"""Effect of a long prompt on running streams: the gaps between their tokens, without and with it.

    python scripts/measure_gap.py BUNDLE --streams 3 --prompt-tokens 4000

Prints JSON, milliseconds. ``--whole`` reads the prompt as a whole where it would be in chunks. A
bundle for long prompts is exported with --max-text-len.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from lvlm.runtime.engine import Engine, Handle

WORD = "a "
WARM = 5  # tokens of each stream that are left out


def gaps(handles: list[Handle], start: float, stop: float) -> np.ndarray:
    """Milliseconds between tokens that were chosen from ``start`` to ``stop`` on perf_counter."""
    found = [np.zeros(0)]
    for handle in handles:
        times = np.array(handle.token_times[WARM:])
        ends = times[1:]
        within = (ends > start) & (times[:-1] < stop)
        found.append(np.diff(times)[within] * 1e3)
    return np.concatenate(found)


def summary(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {"tokens": 0}
    marks = {"median": 50, "p95": 95, "most": 100}
    return {"tokens": len(values)} | {
        name: round(float(np.percentile(values, q)), 1) for name, q in marks.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--streams", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--threads", type=int, help="of each session (default: ONNX Runtime's)")
    parser.add_argument("--quiet-seconds", type=float, default=3.0, help="before the long prompt")
    parser.add_argument("--whole", action="store_true", help="prompts not in chunks")
    args = parser.parse_args()
    endless: dict[str, Any] = {"max_new_tokens": 2000, "ignore_eos": True, "chat_template": False}
    with Engine(
        args.bundle,
        threads=args.threads,
        verify="none",
        slots=args.streams + 1,
        image_cache=0,
        chunk_tokens=0 if args.whole else None,
    ) as engine:
        streams = [engine.submit(WORD * (20 + i), **endless) for i in range(args.streams)]
        for stream in streams:
            for _ in zip(range(WARM + 1), stream.tokens(), strict=False):
                pass
        quiet = time.perf_counter()
        time.sleep(args.quiet_seconds)
        asked = time.perf_counter()
        per_word = len(engine.tokenizer.encode(WORD * 100)) / 100
        prompt = WORD * round(args.prompt_tokens / per_word)
        long = engine.submit(prompt, **(endless | {"max_new_tokens": 1}))
        answer = long.result()
        answered = time.perf_counter()
        for stream in streams:  # the gap in which the prompt was read ends with the next token
            read = len(stream.token_ids)
            while len(stream.token_ids) == read and not stream.done:
                time.sleep(0.001)
            stream.cancel()
    figures = {
        "threads": args.threads,
        "streams": args.streams,
        "whole": args.whole,
        "without": summary(gaps(streams, quiet, asked)),
        "with": summary(gaps(streams, asked, answered)),
        "prompt": {
            "tokens": answer.stats.prompt_tokens,
            "first_token": round((answered - asked) * 1e3),
            "prefill": round(answer.stats.prefill_ms),
        },
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
