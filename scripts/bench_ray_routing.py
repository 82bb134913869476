"""Savings of routing by image: replicas in Ray, asked several questions about each image, with
questions about an image sent to one replica, and with Ray's own choice.

    lvlm-export --model tiny-llava --recipe none -o /tmp/bench/tiny
    python scripts/bench_ray_routing.py /tmp/bench/tiny --image-cache 2MB

Images are drawn at random, questions come in a random order that is the same for both. Prints a
table: requests, images that were encoded, the part of requests that needed no encoding, and time
to the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import random
import re
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
from PIL import Image

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve

from lvlm.runtime.server.ray import app

ENCODED = re.compile(r"^lvlm:image_cache_misses_total\{.*\} (\S+)$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--questions", type=int, default=8, help="about each image")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--image-cache", default="64MB", help="of each replica")
    args = parser.parse_args()
    chance = random.Random(3)
    asked = [(p, q) for p in range(args.images) for q in range(args.questions)]
    chance.shuffle(asked)
    print("| routing | requests | encoded | without encoding | TTFT ms p50 | p95 |")
    print("| --- | --: | --: | --: | --: | --: |", flush=True)
    for routing in ("image", "load"):
        with serving(args, routing) as url:
            before = encoded(url)
            first = asyncio.run(ask(url, asked, args))
            count = encoded(url) - before
        p50, p95 = (1e3 * statistics.quantiles(first, n=20)[n] for n in (9, 18))
        known = 1 - count / len(asked)
        print(f"| {routing} | {len(asked)} | {count} | {known:.0%} | {p50:.1f} | {p95:.1f} |")


@contextmanager
def serving(args: argparse.Namespace, routing: str) -> Iterator[str]:
    """The application in a cluster of its own, at a URL."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=args.replicas,
        include_dashboard=False,
        object_store_memory=128 << 20,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        serve.start(http_options={"port": port})
        given = {"bundle": args.bundle, "replicas": args.replicas, "routing": routing}
        serve.run(app(given | {"image_cache": args.image_cache}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def encoded(url: str) -> int:
    return int(sum(map(float, ENCODED.findall(httpx.get(f"{url}/metrics", timeout=60).text))))


async def ask(url: str, asked: list[tuple[int, int]], args: argparse.Namespace) -> list[float]:
    """Seconds to the first token of each request."""
    limit, first = asyncio.Semaphore(args.concurrency), []

    async def one(client: httpx.AsyncClient, image: int, question: int) -> None:
        async with limit:
            began = time.perf_counter()
            body = {"messages": messages(image, question), "max_tokens": 8, "stream": True}
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as stream:
                stream.raise_for_status()
                events = 0
                async for line in stream.aiter_lines():
                    events += line.startswith("data: ")
                    if events == 2:  # behind the role
                        first.append(time.perf_counter() - began)
                        events += 1

    async with httpx.AsyncClient(timeout=300) as client, asyncio.TaskGroup() as group:
        for image, question in asked:
            group.create_task(one(client, image, question))
    return first


def messages(number: int, question: int) -> list[dict[str, Any]]:
    pixels = np.random.default_rng(number).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    text = {"type": "text", "text": f"Question {question}: what is in the picture?"}
    return [{"role": "user", "content": [image, text]}]


if __name__ == "__main__":
    main()
