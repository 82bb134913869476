"""Times of calls of real sizes (gpu_cases.py), beside a copy, a MatMul and torch's attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from gpu_cases import KernelCase, calls
from gpu_compare import FAILED, OPS, difference, ran, run_calls
from torch.nn.functional import scaled_dot_product_attention

from lvlm.export.ops.op import OpSample
from lvlm.plugins_trt.plugins.library_harness import Harness, read_outputs
from lvlm.plugins_trt.plugins.registry import plugins


def timings(
    harness: Harness,
    work: Path,
    environment: Mapping[str, str],
    ops: Sequence[str],
    longest: int,
    repeats: int,
    *,
    dry_run: bool,
) -> Iterator[str]:
    """Calls of real sizes: time, beside a copy of the same bytes, and what is the same in torch."""
    yield "### Times"
    yield ""
    yield "Microseconds in fp16, medians: a call among many in a row, and replayed as a CUDA graph;"
    yield "a copy on the device that reads and writes as many bytes as the call must; torch.matmul"
    yield "of the MatMuls that the call cannot do without, in fp32 and in fp16; torch's"
    yield "scaled_dot_product_attention over the keys that are valid (SDPA). A ratio is the graph's"
    yield "time over that of the copy, of the fp32 MatMul or of SDPA."
    yield ""
    columns = "| op | call | plain | graph | copy | ratio | fp32 MatMul | ratio | fp16 | SDPA"
    yield f"{columns} | ratio | error |"
    yield "| --- " * 12 + "|"
    for call in calls(ops, longest, torch.device("cpu" if dry_run else "cuda")):
        what = f"{call.op}, {call.name}"
        (report,) = run_calls(harness, work, plugins()[call.op], [call], environment,
                         repeats=repeats)  # fmt: skip
        if not ran(report, what):
            yield f"| {call.op} | {call.name} | failed |"
            continue
        if dry_run:
            yield f"| {call.op} | {call.name} | not run |"
            continue
        sample = OpSample(call.name, call.inputs, call.attributes)
        error = difference(what, call.op, sample, read_outputs(report), exact=call.exact)
        allowed = OPS[call.op].tolerance[torch.float16]
        if call.exact and error > allowed:
            FAILED.append(f"{what}: {error:.2g} is more than {allowed:.2g}")
        cells = [f"{report[key]:.1f}" for key in ("enqueue_us", "graph_us", "copy_us")]
        cells.append(f"{report['graph_us'] / report['copy_us']:.1f}")
        single = _matmul_us(call, torch.float32, repeats)
        half = _matmul_us(call, torch.float16, repeats)
        cells.append(f"{single:.1f}" if single else "")
        cells.append(f"{report['graph_us'] / single:.1f}" if single else "")
        cells.append(f"{half:.1f}" if half else "")
        torchs = _attention_us(call, repeats)
        cells.append(f"{torchs:.1f}" if torchs else "")
        cells.append(f"{report['graph_us'] / torchs:.1f}" if torchs else "")
        yield " | ".join([f"| {call.op}", call.name, *cells, f"{error:.1e} |"])


def _matmul_us(call: KernelCase, dtype: torch.dtype, repeats: int) -> float | None:
    """torch.matmul's time for the call's MatMuls: one of them, times how many there are."""
    if call.matmuls is None:
        return None
    rows, inner, columns, times = call.matmuls
    together = min(times, max(1, (1 << 28) // max(1, rows * columns)))  # a gigabyte of results
    a = torch.randn(together, rows, inner, device="cuda", dtype=dtype)
    b = torch.randn(together, inner, columns, device="cuda", dtype=dtype)
    torch.backends.cuda.matmul.allow_tf32 = False
    return _us(lambda: torch.matmul(a, b), repeats) * times / together


def _attention_us(call: KernelCase, repeats: int) -> float | None:
    """torch's attention over the keys that the call's rows see, all the same number."""
    if not call.attended:
        return None
    query, key, value = (t for t in call.inputs[:3] if t is not None)
    keys, values = (t[:, :, : call.attended] for t in (key, value))
    causal, grouped = query.shape[2] > 1, query.shape[1] != key.shape[1]
    scale = float(call.attributes["scale"])
    return _us(
        lambda: scaled_dot_product_attention(
            query, keys, values, is_causal=causal, scale=scale, enable_gqa=grouped
        ),
        repeats,
    )


def _us(compute: Callable[[], torch.Tensor], repeats: int) -> float:
    """Microseconds of one of ``repeats`` runs in a row, after one that warms up."""
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    compute()
    begin.record()
    for _ in range(repeats):
        compute()
    end.record()
    torch.cuda.synchronize()
    return float(1e3 * begin.elapsed_time(end) / repeats)
