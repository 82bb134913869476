"""Overhead of Ray Serve over lvlm-serve: a text asked of one replica through Ray's proxy, and of
lvlm-serve, one request after the other.

    lvlm-export --model tiny-llava --recipe none -o /tmp/bench/tiny
    python scripts/bench_ray_overhead.py /tmp/bench/tiny

Prints medians: time to the first token of short answers, tokens a second of long ones.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve

from lvlm.runtime.server.ray import app


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle")
    args = parser.parse_args()
    print("| | TTFT ms | tokens/s |")
    print("| --- | --: | --: |")
    for name, serving in (("lvlm-serve", alone), ("Ray Serve", in_ray)):
        with serving(args.bundle) as url:
            ask(url, 5, 8)  # warm
            first, (_, rate) = ask(url, 60, 8)[0], ask(url, 5, 400)
        print(f"| {name} | {1e3 * first:.1f} | {rate:.0f} |", flush=True)


@contextmanager
def alone(bundle: str) -> Iterator[str]:
    command = [sys.executable, "-m", "lvlm", "serve", bundle, "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as made:
        try:
            assert made.stderr is not None
            found = re.search(r"http://\S+", made.stderr.readline())
            assert found is not None
            while httpx.get(f"{found[0]}/ready").status_code != 200:
                time.sleep(0.05)
            yield found[0]
        finally:
            made.kill()


@contextmanager
def in_ray(bundle: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=128 << 20,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        serve.start(http_options={"port": port})
        serve.run(app({"bundle": bundle}))
        yield f"http://127.0.0.1:{port}"
    finally:
        ray.shutdown()


def ask(url: str, count: int, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, tokens a second."""
    first: list[float] = []
    rates: list[float] = []
    with httpx.Client(timeout=60) as client:
        for number in range(count):
            messages = [{"role": "user", "content": f"Say {number}."}]
            body = {"messages": messages, "max_tokens": tokens, "ignore_eos": True, "stream": True}
            began, events = time.perf_counter(), 0
            with client.stream("POST", f"{url}/v1/chat/completions", json=body) as stream:
                for line in stream.iter_lines():
                    events += line.startswith("data: {")
                    if events == 2 and len(first) == number:  # behind the role
                        first.append(time.perf_counter() - began)
            rates.append(tokens / (time.perf_counter() - began))
    return statistics.median(first), statistics.median(rates)


if __name__ == "__main__":
    main()
