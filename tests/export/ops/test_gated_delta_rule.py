"""``GatedDeltaRule`` against transformers' own, in pieces, and beside padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from single_node import feeds, session, single_node_model
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from lvlm.core.errors import ParameterError
from lvlm.export.ops.gated_delta_rule.contract import OP, step
from lvlm.export.ops.op import OpSample

SAMPLES = {sample.name: sample for sample in OP.samples()}
LARGE = SAMPLES["large chunks, float32"]


def computed(sample: OpSample) -> tuple[np.ndarray, np.ndarray]:
    output, final = session(single_node_model(OP, sample)).run(None, feeds(OP, sample))
    return output, final


def test_the_reference_is_transformers_rule() -> None:
    """Its chunked form, which normalises queries and keys, scales queries and pads no rows."""
    query, key, value, decay, beta, state, _ = LARGE.inputs
    assert query is not None
    assert key is not None
    extent, width = key.shape[1], key.shape[3]
    theirs = torch_chunk_gated_delta_rule(
        query, key, value, decay, beta, initial_state=state, output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    length = torch.full((len(key),), extent)
    ours = OP(query * width**-0.5, key, value, decay, beta, state, length)
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their, atol=2e-5, rtol=1e-4)


def test_the_reference_is_one_step_after_another() -> None:
    query, key, value, decay, beta, state, length = (x for x in LARGE.inputs if x is not None)
    wide = [x.repeat_interleave(value.shape[2] // key.shape[2], dim=2) for x in (query, key)]
    for token in range(3):
        given = (x[:, token] for x in (*wide, value, decay, beta))
        state, read = step(*given, state)
    output, final = OP(*(x[:, :3] for x in (query, key, value, decay, beta)), LARGE.inputs[5],
                       torch.minimum(length, torch.tensor(3)))  # fmt: skip
    assert torch.equal(output[:, 2], read)
    assert torch.equal(final, state)


@pytest.mark.parametrize("cut", [1, 63, 64, 65])
def test_pieces_go_on_from_the_state(cut: int) -> None:
    """As prefill and extend do, wherever a prompt is cut."""
    query, key, value, decay, beta, state, length = (x for x in LARGE.inputs if x is not None)
    tokens = query, key, value, decay, beta
    whole = computed(LARGE)
    first = replace(
        LARGE,
        inputs=[*(x[:, :cut] for x in tokens), state, torch.minimum(length, torch.tensor(cut))],
    )
    before, between = computed(first)
    rest = [*(x[:, cut:] for x in tokens), torch.from_numpy(between), (length - cut).clamp(min=0)]
    behind, final = computed(replace(LARGE, inputs=rest))
    np.testing.assert_allclose(final, whole[1], atol=3e-5)
    together = np.concatenate([before, behind], axis=1)
    for row, count in enumerate(length.tolist()):
        np.testing.assert_allclose(together[row, :count], whole[0][row, :count], atol=3e-5)


def test_padding_changes_nothing() -> None:
    """Whatever finite lies there: not a bit of what is valid."""
    *tokens, state, length = (x for x in LARGE.inputs if x is not None)
    there = torch.arange(tokens[0].shape[1]) < length[:, None]
    other = [
        torch.where(there.reshape(*there.shape, *[1] * (x.dim() - 2)), x, -3.0 * x + 1)
        for x in tokens
    ]
    (output, final), (changed, end) = (
        computed(replace(LARGE, inputs=[*x, state, length])) for x in (tokens, other)
    )
    np.testing.assert_array_equal(final, end)
    np.testing.assert_array_equal(output[there.numpy()], changed[there.numpy()])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"state": torch.zeros(2, 4, 16, 8)}, "do not fit"),
        ({"length": torch.tensor([3])}, "do not fit"),
        ({"chunk": 48}, "power of two"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], match: str) -> None:
    names = [formal.name for formal in OP.schema.inputs]
    given = {**dict(zip(names, LARGE.inputs, strict=True)), **LARGE.attributes, **change}
    with pytest.raises(ParameterError, match=match):
        OP(*[given[name] for name in names], chunk=given["chunk"])
