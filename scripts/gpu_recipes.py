"""A recipe's own graphs Prefill, Decode and Compact on Triton kernels and torch's fused attention,
for bench_recipes_torch.py: what an engine would run, without TensorRT.

The modules are those that the exporter traces. Every lvlm op in them runs as its kernel, the cache
is written in place, and attention is torch's scaled_dot_product_attention.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from lvlm.export.graphs import cache_entries
from lvlm.export.graphs.compact import Compact
from lvlm.export.graphs.decode import Decode
from lvlm.export.graphs.graph import BundleGraph
from lvlm.export.graphs.language_graph import LanguageGraph, past_inputs
from lvlm.export.graphs.language_model import LanguageLayer, LanguageModel
from lvlm.export.graphs.prefill import Prefill
from lvlm.export.ops.op import Attribute, Op, computed_by
from lvlm.export.recipes.recipe import Recipe
from lvlm.plugins_trt.plugins.plan_runner import run
from lvlm.plugins_trt.plugins.registry import plugins
from lvlm.runtime.kv.budgets import Budgets
from lvlm.runtime.kv.image_tokens import PrefillPlan, keep_ratios, plan_prefill

ALL_SLOTS = "lvlm-all-slots"
Call = Callable[[], Any]  # gives a tensor
BEFORE = 5  # text tokens before the image's


@dataclass(frozen=True)
class ModelSizes:
    """A Llama-like language model and the tokens of one image."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    image_tokens: int


SHAPES = {
    "llava-7b": ModelSizes("LLaVA-1.5-7B", 32, 4096, 32, 32, 11008, 32064, 576),
    "tiny": ModelSizes("a tiny model", 4, 128, 4, 2, 192, 256, 40),
}


def make_model(shape: ModelSizes, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """Random weights, made on the device."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=32768,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer has no weights
    return model.eval().requires_grad_(False)


def language_of(model: LlamaForCausalLM) -> LanguageModel:
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    return LanguageModel(
        embed=model.model.embed_tokens,
        layers=[LanguageLayer(block, model.model.rotary_emb) for block in model.model.layers],
        norm=model.model.norm,
        head=model.lm_head,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        scale=head**-0.5,
        positions=config.max_position_embeddings,
    )


def on_kernels(
    op: Op, inputs: Sequence[torch.Tensor | None], attributes: Mapping[str, Attribute]
) -> tuple[torch.Tensor, ...]:
    """An op's outputs from its kernels; causal attention from torch's and, if it is scored,
    CacheImportance's kernels."""
    if op.name != "CausalAttention":
        return run(plugins()[op.name], inputs, attributes, checked=False)
    query, key, value, *rest = inputs
    assert query is not None
    assert key is not None
    assert value is not None
    scale = float(attributes["scale"])
    output = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    if not rest or rest[0] is None:
        return (output,)
    slots = torch.arange(key.shape[2], device=key.device).repeat(key.shape[0], 1)
    scored = (query, key, slots, rest[0])
    return output, *run(plugins()["CacheImportance"], scored, {"scale": scale}, checked=False)


def _write(cache: torch.Tensor, update: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    (updated,) = run(plugins()["CacheUpdate"], (cache, update, index), {}, checked=False)
    return updated


def _attend_all(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    tap: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Over every slot of the cache, as when it is full: with a mask torch takes a slower kernel."""
    del module, attention_mask
    tap.query = query
    gqa = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=gqa)
    return out.transpose(1, 2), None


AttentionInterface.register(ALL_SLOTS, _attend_all)


@contextmanager
def engine_like(model: LlamaForCausalLM, attention: str) -> Iterator[None]:
    """Within: ops on kernels, cache writes in place, fused RMS norms, ``attention`` by its name."""
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    before, model.config._attn_implementation = model.config._attn_implementation, attention
    scatter = vars(cache_entries)["scatter"]
    vars(cache_entries)["scatter"] = _write
    for norm in norms:
        norm.forward = types.MethodType(_rms_norm, norm)
    try:
        with torch.no_grad(), computed_by(on_kernels):
            yield
    finally:
        model.config._attn_implementation = before
        vars(cache_entries)["scatter"] = scatter
        for norm in norms:
            del norm.forward


def _rms_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden, (hidden.shape[-1],), self.weight, self.variance_epsilon)


class MeasuredRecipe:
    """One recipe on one model, at one batch and prompt length; every row has one image."""

    def __init__(
        self, model: LlamaForCausalLM, shape: ModelSizes, recipe: Recipe, batch: int, prompt: int
    ) -> None:
        self.model, self.shape, self.batch, self.prompt = model, shape, batch, prompt
        self.language = language_of(model)
        self.recipe = recipe.for_layers(shape.layers)
        self.rule = self.recipe.cache_rule()
        self.budgets = Budgets.of(self.rule.cache_policy if self.rule else None, shape.layers, None)
        self.plan = self._plan()
        self.kept = self.budgets.prompt(self.plan.entries)
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype

    def _plan(self) -> PrefillPlan:
        reductions = self.recipe.reductions()
        exported = float(self.recipe.parameters().get("keep", 1.0))
        image = self.shape.image_tokens
        return plan_prefill(
            reductions,
            keep_ratios(reductions, exported, None),
            self.shape.layers,
            [self.prompt - image] * self.batch,
            [[image]] * self.batch,
            [self.prompt - image - BEFORE] * self.batch,
        )

    def capacity(self, new: int) -> np.ndarray:
        """Slots of every layer [L] for an answer of ``new`` tokens."""
        return self.budgets.capacity(self.plan.entries, np.full(self.batch, new - 1))

    def cache_bytes(self, slots: np.ndarray) -> int:
        """Bytes of keys and values of all rows, ``slots`` [L] each."""
        entry = 2 * self.shape.kv_heads * self.language.head_dim * self.dtype.itemsize
        return int(slots.sum() * self.batch * entry)

    def prefill(self) -> Call:
        """A call without arguments that reads the prompt and fills every layer's cache."""
        image, batch, prompt = self.shape.image_tokens, self.batch, self.prompt
        ids = torch.randint(10, self.shape.vocab, (batch, prompt), device=self.device)
        image_id = torch.zeros_like(ids)
        image_id[:, BEFORE : BEFORE + image] = 1
        row = torch.full_like(ids, -1)
        row[:, BEFORE : BEFORE + image] = torch.arange(batch * image, device=self.device).view(
            batch, image
        )
        features = torch.randn(batch * image, self.language.hidden, device=self.device)
        features = (features * 0.02).to(self.dtype)
        positions = torch.arange(prompt, device=self.device).repeat(batch, 1)
        given = dict(self.plan.inputs) | {"kv_budget": self.kept}
        given |= {f"kv_slots_{i}": np.arange(n) for i, n in enumerate(self.kept.max(1))}
        graph = Prefill(self.language, self.recipe, self.dtype, self.dtype)
        inputs = {
            "input_ids": ids,
            "image_features": features,
            "image_row": row,
            "image_id": image_id,
            "position_ids": positions,
            **self._on_device(given),
            **self._buffers(self.kept.max(1), graph),
        }
        return _calling(graph, inputs)

    def decode(self, slots: np.ndarray) -> Call:
        """One step over caches of ``slots`` [L], all of them valid; the last slot is written."""
        shape = (self.shape.layers, self.batch)
        valid = torch.from_numpy(np.broadcast_to(slots[:, None], shape).copy()).to(self.device)
        ids = torch.randint(10, self.shape.vocab, (self.batch, 1), device=self.device)
        positions = torch.full_like(ids, int(slots.max()))
        graph = Decode(self.language, self.rule, self.dtype)
        inputs = {
            "input_ids": ids,
            "position_ids": positions,
            "write_index": valid - 1,
            "valid_length": valid,
            "query_index": torch.zeros(self.batch, dtype=torch.int64, device=self.device),
            **self._buffers(slots, graph),
        }
        logits = _calling(graph, inputs)
        return lambda: logits().argmax(-1)

    def compact(self) -> Call | None:
        """One compaction of all rows, as due after an interval; None: the recipe has none."""
        rule = self.rule
        if rule is None or rule.cache_policy.interval is None:
            return None
        interval = rule.cache_policy.interval
        budget = self.budgets.step(self.plan.entries + interval)
        valid = self.budgets.step(self.plan.entries) + interval
        back = np.arange(rule.queries - 1, -1, -1)
        given = {
            "valid_length": valid,
            "query_slot": (valid - 1)[..., None] - back,
            "kv_budget": budget,
        }
        given |= {f"kv_slots_{i}": np.arange(n) for i, n in enumerate(budget.max(1))}
        graph = Compact(self.language, rule, self.dtype)
        return _calling(graph, self._on_device(given) | self._buffers(valid.max(1), graph), "kept")

    def _on_device(self, given: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {
            name: torch.from_numpy(np.ascontiguousarray(x)).to(self.device)
            for name, x in given.items()
        }

    def _buffers(self, slots: np.ndarray, graph: LanguageGraph) -> dict[str, torch.Tensor]:
        model = self.language
        ring = (self.batch, model.heads, graph.queries, model.head_dim)
        return past_inputs(
            {
                kind: [
                    torch.randn(
                        ring
                        if kind == "query"
                        else (self.batch, model.kv_heads, int(n), model.head_dim),
                        device=self.device,
                        dtype=self.dtype,
                    )
                    for n in slots
                ]
                for kind in graph.kinds
            }
        )


def _calling(graph: BundleGraph, inputs: Mapping[str, torch.Tensor], name: str = "logits") -> Call:
    return lambda: graph(inputs)[name]
