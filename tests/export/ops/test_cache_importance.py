"""``CacheImportance`` against loops over rows, heads and queries; padding; peak memory."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from single_node import feeds, session, single_node_model

from lvlm.core.errors import ParameterError
from lvlm.export.ops.cache_importance import OP
from lvlm.export.ops.op import OpSample
from lvlm.export.ops.parts.chunked_attention import PARTS

ENGINES = ("torch", "onnx")
NAN = float("nan")
LAYOUTS = [(1, 1, 32), (2, 2, 64), (1, 3, 80), (2, 1, 96), (1, 2, 128)]  # key heads, group, width
CHUNKS = [{"chunk": 3}, {"chunk": 128}, {"parts": 3}]
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # the op's inputs


def by_loops(
    query: np.ndarray, key: np.ndarray, slots: np.ndarray, length: np.ndarray
) -> np.ndarray:
    batch, heads, rows, width = query.shape
    group = heads // key.shape[1]
    importance = np.zeros((batch, key.shape[2]))
    for b in range(batch):
        for r in range(rows):
            if not 0 <= slots[b, r] < length[b]:
                continue
            for h in range(heads):
                seen = key[b, h // group, : slots[b, r] + 1]
                logits = [float(query[b, h, r] @ k) / math.sqrt(width) for k in seen]
                weights = [math.exp(x - max(logits)) for x in logits]
                for j, weight in enumerate(weights):
                    importance[b, j] += weight / sum(weights) / heads
    return importance


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Unused rows and padding hold NaN."""
    key_heads, group, width = draw(st.sampled_from(LAYOUTS))
    batch, extent, rows = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 8))
    length = torch.tensor([draw(st.integers(1, extent)) for _ in range(batch)])
    slot = st.integers(-1, extent)  # beyond the valid keys: unused as well
    slots = torch.tensor([[draw(slot) for _ in range(rows)] for _ in range(batch)])
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    query = 3 * torch.randn(batch, key_heads * group, rows, width, generator=random)
    key = torch.randn(batch, key_heads, extent, width, generator=random)
    unused = (slots < 0) | (slots >= length[:, None])
    query = query.masked_fill(unused[:, None, :, None], NAN)
    key = key.masked_fill((torch.arange(extent) >= length[:, None])[:, None, :, None], NAN)
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    return query.to(dtype), key.to(dtype), slots, length


@functools.cache
def runner(
    layout: tuple[int, int, int], dtype: torch.dtype, chunk: tuple[tuple[str, int], ...]
) -> onnxruntime.InferenceSession:
    key_heads, group, width = layout
    one = torch.ones(1, 1, dtype=torch.int64)
    query = torch.zeros(1, key_heads * group, 1, width, dtype=dtype)
    key = torch.zeros(1, key_heads, 1, width, dtype=dtype)
    attributes = {"scale": width**-0.5, **dict(chunk)}
    return session(single_node_model(OP, OpSample("", (query, key, one, one[0]), attributes)))


def run(case: Case, chunk: dict[str, int], engine: str) -> np.ndarray:
    query, key, _, _ = case
    if engine == "torch":
        return OP(*case, scale=query.shape[3] ** -0.5, **chunk)[0].numpy()
    layout = (key.shape[1], query.shape[1] // key.shape[1], key.shape[3])
    feed = feeds(OP, OpSample("", case))
    return runner(layout, query.dtype, tuple(chunk.items())).run(None, feed)[0]


@settings(max_examples=examples(120), deadline=None)
@given(cases(), st.sampled_from(CHUNKS))
def test_matches_loops(case: Case, chunk: dict[str, int]) -> None:
    query, key, slots, length = (t.numpy() for t in case)
    expected = by_loops(query.astype(np.float64), key.astype(np.float64), slots, length)
    for engine in ENGINES:
        found = run(case, chunk, engine)
        np.testing.assert_allclose(found, expected, atol=5e-6, err_msg=engine)


@settings(max_examples=examples(60), deadline=None)
@given(cases(), st.integers(1, 3))
def test_other_rows_and_longer_padding_change_nothing(case: Case, more: int) -> None:
    query, key, slots, length = case
    longer = torch.nn.functional.pad(key, (0, 0, 0, more), value=NAN)
    for engine in ENGINES:
        alone = run((query[:1], key[:1], slots[:1], length[:1]), CHUNKS[0], engine)
        found = run((query, longer, slots, length), CHUNKS[0], engine)
        np.testing.assert_allclose(found[:1, :-more], alone, atol=1e-6)
        assert not found[:, -more:].any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_what_is_not_finite_shows_and_stays_in_its_row(engine: str, chunk: dict[str, int]) -> None:
    length, slots = torch.tensor([5, 6, 6]), torch.arange(6).expand(3, -1)
    random = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 6, 64, generator=random)
    key = torch.randn(3, 2, 6, 64, generator=random)
    query[0, 3, 2, 5] = NAN
    key[2, 1, 4, 63] = float("inf")
    found = run((query, key, slots, length), chunk, engine)
    assert not np.isfinite(found[0, :3]).any()  # what query 2 sees
    assert found[0, 5] == 0  # padding, even now
    assert np.isfinite(found[1]).all()
    assert not np.isfinite(found[2]).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_shares_out_one_for_each_query(engine: str) -> None:
    random = torch.Generator().manual_seed(0)
    query = torch.randn(1, 6, 300, 64, generator=random) * 3
    key = torch.randn(1, 3, 300, 64, generator=random)
    slots, length = torch.arange(300)[None], torch.tensor([290])
    found = run((query, key, slots, length), {}, engine)
    assert found.sum() == pytest.approx(290, abs=1e-3)
    assert (found[0, :290] <= np.arange(290, 0, -1) + 1e-3).all()  # as many as see it
    assert not found[0, 290:].any()


def test_chunks_of_any_size_give_the_same() -> None:
    case = next(s.inputs for s in OP.samples() if s.name.startswith("whole prompt, grouped"))
    (expected,) = OP(*case, scale=0.1)
    for chunk in ({"chunk": 1}, {"chunk": 5}, {"parts": 1}, {"parts": 100}):
        torch.testing.assert_close(OP(*case, scale=0.1, **chunk)[0], expected)


def test_what_does_not_fit_is_refused() -> None:
    key, index, length = torch.zeros(1, 2, 4, 8), torch.tensor([[3]]), torch.tensor([4])
    with pytest.raises(ParameterError, match="3 query heads are no multiple of 2 key heads"):
        OP(torch.zeros(1, 3, 1, 8), key, index, length, scale=1.0)
    with pytest.raises(ParameterError, match="do not fit"):
        OP(torch.zeros(1, 2, 1, 6), key, index, length, scale=1.0)
    query = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ParameterError, match=r"query_slot is \[B, R\] and length \[B\]"):
        OP(query, key, index[0], length, scale=1.0)
    with pytest.raises(ParameterError, match="chunk is 0, at least 1 is needed"):
        OP(query, key, index, length, scale=1.0, chunk=0)
    with pytest.raises(ParameterError, match="parts is -1, at least 0"):
        OP(query, key, index, length, scale=1.0, parts=-1)


MEASURE = """
import json, os, resource, sys
import onnx_ir, onnxruntime, torch
from lvlm.export.ops import cache_importance, causal_attention
from lvlm.export.ops.op import OpSample
from single_node import feeds, session, single_node_model
from lvlm.export.targets.passes.graph_edits import lower_ops

N, HEADS, KEY_HEADS, WIDTH = json.loads(sys.argv[1])
torch.set_num_threads(1)

def inputs(op_name, n):
    query = torch.randn(1, HEADS, n, WIDTH)
    key, value = torch.randn(2, 1, KEY_HEADS, n, WIDTH)
    length, slots = torch.tensor([n]), torch.arange(n)[None]
    if op_name == "CacheImportance":
        return query, key, slots, length
    return query, key, value, length

def grown(op_name, engine):
    op, attributes = cache_importance.OP, {"scale": 0.125}
    if op_name == "CausalAttention":
        op, attributes = causal_attention.OP, {"scale": 0.125, "importance": 1}
    small, large = (OpSample("", inputs(op_name, n), attributes) for n in (1, N))
    if engine == "torch":
        run = lambda sample: op(*sample.inputs, **attributes)
    else:
        model = onnx_ir.from_proto(single_node_model(op, small))
        if engine == "onnx for tensorrt":
            lower_ops(model, plugins=False)
        runner = session(onnx_ir.to_proto(model))
        run = lambda sample: runner.run(None, feeds(op, sample))
    run(small)  # what a library allocates once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(large)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024

found = {}
for op_name in ("CacheImportance", "CausalAttention"):
    for engine in ("torch", "onnx", "onnx for tensorrt"):
        if engine == "onnx for tensorrt" and op_name == "CacheImportance":
            continue  # as for onnx
        # A peak never goes down again: each is measured in a process of its own.
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, json.dumps(grown(op_name, engine)).encode())
            os._exit(0)
        os.close(write)
        found[f"{op_name}, {engine}"] = json.loads(os.read(read, 100))
        os.wait()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures the peak as Linux reports it")
def test_no_whole_attention_matrix_is_ever_in_memory() -> None:
    prompt, heads = 4000, 4
    sizes = json.dumps([prompt, heads, 2, 64])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, sizes],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # with the tests' helpers
    )
    whole = heads * prompt * prompt * 4
    found = json.loads(done.stdout)
    assert len(found) == 5
    for name, grown in found.items():
        # Its chunks have 250 rows, not 128.
        rows, share = (prompt // PARTS, 2) if name.endswith("tensorrt") else (128, 4)
        chunk = heads * rows * prompt * 4
        assert grown > chunk, f"{name}: {grown} bytes; the measurement sees nothing"
        assert grown < whole / share, f"{name}: {grown / whole:.0%} of the whole matrix"
