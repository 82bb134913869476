"""Cost of HTTP: a bundle's engine asked through lvlm-serve, and asked directly.

    python scripts/make_checkpoint.py --shape 135m -o /tmp/bench/checkpoint
    lvlm-export -m /tmp/bench/checkpoint --max-text-len 1024 -o /tmp/bench/none --no-validate
    python scripts/bench_server.py /tmp/bench/none --concurrency 1,4,16,32

Requests have an image of their own and a short text; answers are streamed to their full length,
with logprobs, so that every token has an event, whether it has text or not. For each concurrency,
in turn and several rounds: the server in a process of its own, asked by this one; then the engine
in a process of its own, which a client beside it does not ask, but that takes as much CPU time a
second as asking took this one before (a client is no part of an engine, and would take its time
from it). Prints a table: new tokens a second, time to the first token, the client's CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
from PIL import Image

TEXT = "Tell me what there is to be seen in the picture, from the left to the right, and why."
WARM = 9999  # seed of what is asked before anything is measured
BEAT = 0.01  # seconds: what a burner does is laid out over so many


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--concurrency", default="1,4,16,32")
    parser.add_argument("--requests", type=int, help="of a round (default: 2 of each stream)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--text-only", action="store_true", help="without images")
    parser.add_argument("--engine", type=int, metavar="N", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine is not None:
        print(json.dumps(asyncio.run(ask_engine(args))))
        return
    print(f"{os.path.basename(args.bundle)}: {args.new_tokens} new tokens, {os.cpu_count()} CPUs")
    print("| at once | HTTP tokens/s | engine tokens/s | ratio | TTFT ms | its | client CPU s |")
    print("| --: | --: | --: | --: | --: | --: | --: |", flush=True)
    for concurrency in map(int, args.concurrency.split(",")):
        rounds = [compared(args, concurrency, seed) for seed in range(args.rounds)]
        http, own, first, its, cpu = (statistics.median(x) for x in zip(*rounds, strict=True))
        ratio = statistics.median(a / b for a, b, *_ in rounds)
        print(
            f"| {concurrency} | {http:.1f} | {own:.1f} | {ratio:.3f} | {first:.1f} | {its:.1f} "
            f"| {cpu:.2f} |",
            flush=True,
        )


def compared(args: argparse.Namespace, concurrency: int, seed: int) -> Sequence[float]:
    """Tokens a second through HTTP and without, medians of times to the first token, CPU time."""
    count = args.requests or 2 * concurrency
    with serving(args.bundle, concurrency) as url:
        asyncio.run(ask_server(args, url, 1, 1, WARM))  # images and texts are new to it later
        before = cpu_seconds()
        seconds, first = asyncio.run(ask_server(args, url, concurrency, count, seed))
        cpu = cpu_seconds() - before
    command = [sys.executable, __file__, args.bundle, "--engine", str(concurrency)]
    command += ["--count", str(count), "--new-tokens", str(args.new_tokens), "--seed", str(seed)]
    command += ["--text-only"] if args.text_only else []
    with burning(cpu / seconds):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    own_seconds, own_first = json.loads(done.stdout.splitlines()[-1])
    tokens = count * args.new_tokens
    return tokens / seconds, tokens / own_seconds, first, own_first, cpu


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def image(number: int) -> Image.Image:
    pixels = np.random.default_rng(number + 7).integers(0, 255, (336, 336, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def images(count: int, seed: int) -> list[bytes]:
    """PNG files, new ones for each seed."""
    found = []
    for number in range(count):
        buffer = io.BytesIO()
        image(1000 * seed + number).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


@contextmanager
def serving(bundle: str, slots: int) -> Iterator[str]:
    """The address of lvlm-serve in a process of its own."""
    command = [sys.executable, "-m", "lvlm", "serve", f"model={bundle}", "--port", "0"]
    command += ["--slots", str(slots), "--verify", "none", "--log-level", "error"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = re.search(r"http://\S+", process.stderr.readline())
        assert found is not None, process.stderr.read()
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            while True:
                try:
                    if httpx.get(f"{found[0]}/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield found[0]
        finally:
            process.terminate()


async def ask_server(
    args: argparse.Namespace, url: str, concurrency: int, count: int, seed: int
) -> tuple[float, float]:
    """Seconds of all requests, and the median of milliseconds to the first token's event."""
    bodies = []
    for file in images(count, seed):
        parts: list[dict[str, Any]] = [{"type": "text", "text": TEXT}]
        if not args.text_only:
            url_of_it = "data:image/png;base64," + base64.b64encode(file).decode()
            parts.insert(0, {"type": "image_url", "image_url": {"url": url_of_it}})
        asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": args.new_tokens}
        bodies.append(
            json.dumps(asked | {"ignore_eos": True, "stream": True, "logprobs": True}).encode()
        )
    limit, firsts = asyncio.Semaphore(concurrency), list[float]()
    headers = {"Content-Type": "application/json"}

    async def one(client: httpx.AsyncClient, body: bytes) -> None:
        async with limit:
            began, seen = time.perf_counter(), 0
            path = f"{url}/v1/chat/completions"
            async with client.stream("POST", path, content=body, headers=headers) as answer:
                assert answer.status_code == 200, await answer.aread()
                async for chunk in answer.aiter_raw():
                    seen += chunk.count(b"data: ")
                    if seen > 1 and began:
                        firsts.append((time.perf_counter() - began) * 1e3)
                        began = 0.0

    async with httpx.AsyncClient(timeout=None) as client:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for body in bodies:
                group.create_task(one(client, body))
        return time.perf_counter() - began, statistics.median(firsts)


async def ask_engine(args: argparse.Namespace) -> tuple[float, float]:
    """The same of an engine of this process."""
    from lvlm.runtime.engine import Engine
    from lvlm.runtime.engine.aio import AsyncEngine
    from lvlm.runtime.server.following import follow

    firsts: list[float] = []
    limit = asyncio.Semaphore(args.engine)

    async def one(engine: AsyncEngine, file: bytes) -> None:
        async with limit:
            parts: list[dict[str, Any]] = [{"type": "text", "text": TEXT}]
            if not args.text_only:
                parts.insert(0, {"type": "image", "image": file})
            asked = [{"role": "user", "content": parts}]
            began = time.perf_counter()  # images are opened from here on, as in the server
            answer = await engine.submit(
                asked, max_new_tokens=args.new_tokens, ignore_eos=True, logprobs=0
            )
            async for _ in follow([answer.handle]):
                pass
            firsts.append((answer.handle.token_times[0] - began) * 1e3)

    async with AsyncEngine(Engine(args.bundle, slots=args.engine, verify="none")) as engine:
        await one(engine, images(1, WARM)[0])
        firsts.clear()
        files = images(args.count, args.seed)
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for file in files:
                group.create_task(one(engine, file))
        seconds = time.perf_counter() - began
    return seconds, statistics.median(firsts)


@contextmanager
def burning(share: float) -> Iterator[None]:
    """A process beside that takes ``share`` of a CPU."""
    code = (
        "import sys, time\n"
        "share, beat = float(sys.argv[1]), float(sys.argv[2])\n"
        "while True:\n"
        "    until = time.thread_time() + share * beat\n"
        "    began = time.perf_counter()\n"
        "    while time.thread_time() < until: pass\n"
        "    time.sleep(max(0.0, beat - (time.perf_counter() - began)))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(min(1.0, share)), str(BEAT)]) as process:
        try:
            yield
        finally:
            process.kill()


if __name__ == "__main__":
    main()
