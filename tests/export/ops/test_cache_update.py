"""``CacheUpdate`` against loops over rows, heads and entries, and what it refuses."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from single_node import feeds, session, single_node_model

from lvlm.core.errors import ParameterError
from lvlm.export.ops.cache_update import OP
from lvlm.export.ops.op import OpSample

Write = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # cache, update, index


@st.composite
def writes(draw: st.DrawFn) -> Write:
    """Of one graph: heads, capacity and head size are fixed in it."""
    batch, entries = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    index = [draw(st.integers(0, 9 - entries)) for _ in range(batch)]
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    cache = torch.randn(batch, 3, 9, 8, generator=random)
    update = torch.randn(batch, 3, entries, 8, generator=random)
    update[..., 0], cache[..., 1] = -0.0, float("nan")
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    return cache.to(dtype), update.to(dtype), torch.tensor(index)


@functools.cache
def graph(dtype: torch.dtype) -> onnxruntime.InferenceSession:
    states = torch.zeros(2, 3, 9, 8, dtype=dtype)
    sample = OpSample("graph", (states, states[:, :, :2], torch.tensor([0, 1])))
    return session(single_node_model(OP, sample))


@settings(max_examples=examples(100), deadline=None)
@given(writes())
def test_matches_loops(write: Write) -> None:
    cache, update, index = write
    expected = cache.numpy().copy()
    for row, first in enumerate(index.tolist()):
        for head in range(cache.shape[1]):
            for entry in range(update.shape[2]):
                expected[row, head, first + entry] = update[row, head, entry]
    integer = np.int16 if cache.dtype == torch.float16 else np.int32
    before = cache.clone()
    (found,) = OP(*write)
    (onnx_found,) = graph(cache.dtype).run(None, feeds(OP, OpSample("write", write)))
    for have in (found.numpy(), onnx_found):
        np.testing.assert_array_equal(have.view(integer), expected.view(integer))
    np.testing.assert_array_equal(cache.numpy(), before.numpy())  # the reference works on a copy


def test_what_does_not_fit_is_refused() -> None:
    cache, update = torch.zeros(2, 3, 9, 8), torch.zeros(2, 3, 4, 8)

    def refused(match: str, cache: torch.Tensor, update: torch.Tensor, index: list[int]) -> None:
        with pytest.raises(ParameterError, match=match):
            OP(cache, update, torch.tensor(index))

    refused("row 1 would write slots 6 to 9 of a cache of 9", cache, update, [5, 6])
    refused("row 0 would write slots -1 to 2 of a cache of 9", cache, update, [-1, 0])
    refused(r"\(2, 3, 9, 8\), \(2, 3, 4, 8\) and \(3,\)", cache, update, [0, 0, 0])
    refused("do not fit", cache, update[:, :2], [0, 0])
    refused("do not fit", cache, update[..., :7], [0, 0])
    refused("do not fit", cache, update[:1], [0, 0])
    refused("do not fit", cache[0], update[0], [0])
    OP(cache, update, torch.tensor([0, 5]))
