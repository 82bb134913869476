"""Load time, memory, prefill and decode of one bundle on several devices.

    lvlm-export -m CHECKPOINT --dtype fp32 --max-text-len 2048 --target openvino -o bundle/
    python scripts/bench_devices.py bundle/ --devices cpu openvino --batch 1 4 --prompt 608 2000

Random tokens, one image a prompt where the prompt is long enough for one. Every line is of a
process of its own, so that its peak memory is its own. Decode is the median of ``--steps`` steps,
prefill the median of ``--rounds`` after one to warm up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from random_prompt import prompt_for

import lvlm


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--devices", nargs="+", default=["cpu", "openvino"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, nargs="+", default=[608])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    print("| device | prompt | batch | load s | resident MB | peak MB | prefill ms | decode ms |")
    print("| --- | --: | --: | --: | --: | --: | --: | --: |")
    for length in args.prompt:
        for batch in args.batch:
            for device in args.devices:
                command = [sys.executable, __file__, str(args.bundle), "--one", device]
                command += ["--batch", str(batch), "--prompt", str(length)]
                command += ["--steps", str(args.steps), "--rounds", str(args.rounds)]
                command += [] if args.threads is None else ["--threads", str(args.threads)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{device}: {done.stderr.strip().splitlines()[-1]}")
                found = json.loads(done.stdout.splitlines()[-1])
                row = (device, length, batch, *(f"{value:.4g}" for value in found.values()))
                print(f"| {' | '.join(map(str, row))} |", flush=True)


def measure(args: argparse.Namespace) -> dict[str, float]:
    before = memory("VmRSS")
    began = time.perf_counter()
    with lvlm.load(args.bundle, device=args.one, threads=args.threads, verify="none") as model:
        load, resident = time.perf_counter() - began, memory("VmRSS") - before
        length, made = args.prompt[0], range(args.batch[0])
        rows = [prompt_for(model.manifest, length, args.steps, row) for row in made]
        prefills, steps = [], []
        for _ in range(args.rounds + 1):
            batch = model.calls.start(rows)
            prefills.append(batch.running[0].prefill_ms)
        for _ in range(args.steps - 1):
            chosen = batch.logits.argmax(1).tolist()
            began = time.perf_counter()
            batch.feed(chosen)
            steps.append(1e3 * (time.perf_counter() - began))
        peak = memory("VmHWM") - before
    return {
        "load": load,
        "resident": resident,
        "peak": peak,
        "prefill": statistics.median(prefills[1:]),
        "decode": statistics.median(steps),
    }


def memory(which: str) -> float:
    """MB: VmRSS, resident now; VmHWM, the most so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1.024e-3 * int(next(line for line in lines if line.startswith(which)).split()[1])


if __name__ == "__main__":
    main()
