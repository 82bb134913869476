"""Faults to put into the product, and for each the cheap test that must see it.

Each replaces one piece of one source file. What a test must notice is written down here, so a
test that no longer can is found by ``pytest tests/mutations --whole``.
"""

from __future__ import annotations

from dataclasses import dataclass

PARITY = "tests/parity/test_parity.py::test_none_equals_transformers_generate"
BIASED = f"{PARITY}[llava:llama-mha-bias-rope3-siglip]"
GROUPED = f"{PARITY}[llava:llama-gqa-clip]"
TIED = f"{PARITY}[llava:qwen2-tied-siglip]"
CHOICES = "tests/runtime/sampling/test_caller_choices.py"
# What the torch reference, too, is made of: only code that shares nothing can see it.
TWIN = "tests/naive/test_naive_twins.py::test_lightvlm[0.35-0.3]"


@dataclass(frozen=True)
class Fault:
    """``old``, found once in ``file`` of the package, becomes ``new``; ``test`` must fail."""

    file: str
    old: str
    new: str
    test: str


FAULTS = {
    "divprune starts with the token most like another": Fault(
        "runtime/reductions/divprune.py",
        "distance.min(axis=1).argmax()",
        "distance.min(axis=1).argmin()",
        "tests/runtime/reductions/test_rules.py::test_divprune_by_hand",
    ),
    "what is merged by visionzip takes the target's place": Fault(
        "runtime/reductions/visionzip.py",
        "out[place] += features[own].mean(axis=0)",
        "out[place] = features[own].mean(axis=0)",
        "tests/runtime/reductions/test_rules.py::test_visionzip_by_hand",
    ),
    "image tokens that stay have the positions of the first ones": Fault(
        "runtime/prompt/shortened.py",
        "positions[..., prompt.image_id == number] = prompt.whole.positions[..., places]",
        "del places",
        "tests/runtime/prompt/test_shortened.py::test_positions_are_their_own",
    ),
    "an image cut in another way is taken for the same": Fault(
        "runtime/media/prepared_image.py",
        "            found.update(repr(self.choice).encode())\n",
        "            pass\n",
        "tests/runtime/prompt/test_shortened.py::test_the_digest_says_what_stays",
    ),
    "no decode steps between two whole prompts": Fault(
        "runtime/engine/scheduler.py",
        "        self._owed = self.pace.steps_after(took, queue=queue and prefilling.in_slices)\n",
        "",
        "tests/runtime/engine/test_engine_chunks.py::test_and_between_whole_prompts",
    ),
    "a cancelled request's prompt is read to its end": Fault(
        "runtime/engine/scheduler.py",
        "        self._stop_unwanted()\n        with self._changed:\n",
        "        with self._changed:\n",
        "tests/runtime/engine/test_engine_ends.py::test_cancelled_in_prefill",
    ),
    "q, k and v biases dropped": Fault(
        "export/weights/steps/fuse_linears.py",
        "    if first.bias is not None:\n        nodes.append",
        "    if first.bias is None:\n        nodes.append",
        BIASED,
    ),
    "q and k biases swapped in the fused product": Fault(
        "export/weights/steps/fuse_linears.py",
        'tuple(m.bias or "" for m in members)',
        'tuple(m.bias or "" for m in (*members[1::-1], *members[2:]))',
        BIASED,
    ),
    "two norms swapped": Fault(
        "export/weights/store.py",
        "stored_names[parameter]",
        'stored_names[parameter.replace("input_layernorm", "x").replace('
        '"post_attention_layernorm", "input_layernorm").replace(".x.", '
        '".post_attention_layernorm.")]',
        BIASED,
    ),
    "wrong rope theta": Fault(
        "export/families/parts/llama_text.py",
        "    return config\n\n\ndef _check_sizes",
        '    config.text_config.rope_parameters["rope_theta"] = 5000.0\n'
        "    return config\n\n\ndef _check_sizes",
        GROUPED,
    ),
    "sine and cosine swapped": Fault(
        "export/standard_ops.py",
        "[cos[..., : size // 2], sin[..., : size // 2]]",
        "[sin[..., : size // 2], cos[..., : size // 2]]",
        GROUPED,
    ),
    "attention without its scale": Fault(
        "export/standard_ops.py",
        "query.shape[-1] ** -0.5 if scaling is None else float(scaling)",
        "1.0",
        GROUPED,
    ),
    "key heads of a group in the wrong order": Fault(
        "export/standard_ops.py",
        "    if tap is not None:\n        tap.query,",
        "    key, value = key.flip(1), value.flip(1)\n    if tap is not None:\n        tap.query,",
        GROUPED,
    ),
    "position after an image off by one": Fault(
        "runtime/prompt/prompts.py",
        "here + image.span, int(",
        "here + image.span + 1, int(",
        f"{PARITY}[qwen2-vl:gqa]",
    ),
    "special tokens in messages taken for the model's own": Fault(
        "runtime/prompt/literal_tokens.py",
        "if self._mistaken(encoded, whole, literal) is None:",
        "if True:",
        "tests/runtime/prompt/test_literal_tokens.py::test_special_tokens_in_messages_are_text",
    ),
    "white space of a message not seen by its template": Fault(
        "runtime/prompt/literal_text.py",
        'left = text.lstrip(*given) if name == "strip" else made',
        "left = made",
        "tests/runtime/prompt/test_literal_text.py",
    ),
    "position of new tokens off by one": Fault(
        "runtime/kv/slot_counts.py",
        "            return true\n",
        "            return true + 1\n",
        GROUPED,
    ),
    "projector without its last bias": Fault(
        "export/families/parts/llava_like.py",
        "self.projector(features).flatten(0, 1)",
        "(self.projector(features) - self.projector.linear_2.bias).flatten(0, 1)",
        BIASED,
    ),
    "features of the layer before": Fault(
        "export/families/parts/feature_layers.py",
        "[layer % (depth + 1)",
        "[(layer - 1) % (depth + 1)",
        BIASED,
    ),
    "wrong epsilon of norms": Fault(
        "export/standard_ops.py",
        '"epsilon": epsilon',
        '"epsilon": 0.1',
        BIASED,
    ),
    "a window one token too wide": Fault(
        "export/graphs/attending.py",
        "behind < window",
        "behind <= window",
        "tests/export/families/test_another_family.py::test_answers_are_those_of_transformers",
    ),
    "extend: a window into the past one token too wide": Fault(
        "export/graphs/extend.py",
        "- slots < window",
        "- slots <= window",
        "tests/export/families/test_another_family.py::test_answers_are_those_of_transformers",
    ),
    "image tokens see only what is before them": Fault(
        "export/graphs/attending.py",
        "(image_id > 0)[:, None]",
        "(image_id > 9)[:, None]",
        "tests/parity/test_parity.py::test_none_equals_transformers_generate[gemma3:gqa-window]",
    ),
    "extend: image tokens see only what is before them": Fault(
        "export/graphs/extend.py",
        "seen_among(new, window, image_id, index)",
        "seen_among(new, window, image_id - 9, index)",
        "tests/parity/test_extend.py::test_any_cut_gives_the_logits_and_the_cache_of_prefill"
        "[gemma3:gqa-window]",
    ),
    "a chunk ends in an image whose tokens see one another": Fault(
        "runtime/generate/pieces.py",
        "if images.bidirectional and",
        "if not images.bidirectional and",
        "tests/export/families/test_family_gemma3.py::test_prompts_in_pieces",
    ),
    "image tokens are ranked as if they saw only what is before them": Fault(
        "export/graphs/attending.py",
        "return self._ends",
        "return torch.arange(image_id.shape[1]).expand_as(image_id)",
        "tests/export/budgets/test_calibration.py"
        "::test_importances_are_the_column_sums_of_the_attention[gemma3:wide-window]",
    ),
    "tokens of a prompt that all see one another see only what is before them": Fault(
        "export/graphs/attending.py",
        "expand(-1, image_id.shape[1], -1)",
        "expand(-1, image_id.shape[1], -1).tril()",
        "tests/export/graphs/test_attending.py"
        "::test_all_of_a_prompt_sees_all_of_it_as_in_paligemma[2]",
    ),
    "entries of a prompt whose tokens all see one another serve another prompt": Fault(
        "runtime/engine/open_batch.py",
        " and not manifest.text.bidirectional",
        "",
        "tests/export/families/test_family_paligemma.py::test_what_was_read_before_is_read_again",
    ),
    "a new entry's logit that is not capped where the host writes": Fault(
        "export/targets/passes/host_writes.py",
        "capped(g, scores, softcap), capped(g, own, softcap)",
        "capped(g, scores, softcap), own",
        "tests/export/targets/test_target_openvino.py"
        "::test_attention_beside_a_new_entry_is_attention_over_the_written_cache[0.5-False-float]",
    ),
    "tokens ranked by logits that are not capped": Fault(
        "export/ops/token_importance.py",
        "logits = softcap * torch.tanh(logits / softcap)",
        "pass",
        "tests/export/ops/test_token_importance.py::test_matches_loops",
    ),
    "extend: features of a chunk's image off by one": Fault(
        "runtime/generate/loaded_graphs.py",
        "number[some] - first, -1)",
        "number[some] - first - (span.start > 0), -1)",
        "tests/parity/test_extend.py::test_any_cut_gives_the_logits_and_the_cache_of_prefill"
        "[digits-llava]",
    ),
    "extend: one slot beyond a row's entries seen": Fault(
        "export/graphs/extend.py",
        "slots[None] < index[:, None]",
        "slots[None] <= index[:, None]",
        "tests/parity/test_extend.py::test_rows_of_different_lengths_at_once[digits-llava]",
    ),
    "sessions: what a token evicts is seen by it": Fault(
        "runtime/kv/tokens_at_once.py",
        "lies[every, slot][taken]] = token\n",
        "lies[every, slot][taken]] = token + 1\n",
        "tests/runtime/kv/test_tokens_at_once.py::test_what_is_counted_at_once_is_what_decode_does",
    ),
    "sessions: entries written in another order": Fault(
        "export/graphs/blocks.py",
        "values.index_select(2, self.written)",
        "values.index_select(2, self.written.flip(0))",
        "tests/runtime/engine/test_sessions.py::test_turns_are_read_as_decode_reads_them"
        "[elastic-cache (cached)]",
    ),
    "sessions: a turn goes on behind another conversation": Fault(
        "runtime/engine/slots.py",
        "for row in own if shared[row] == len(held[row].keys)}",
        "for row in own if shared[row]}",
        "tests/runtime/engine/test_sessions.py::test_what_makes_a_turn_be_taken_as_a_whole"
        "[elastic-cache (cached)]",
    ),
    "question-free entries cut at another place": Fault(
        "runtime/engine/session.py",
        "(tokens - int(self.entries[0, 0]))",
        "(tokens - int(self.entries[-1, 0]))",
        "tests/parity/test_question_free.py::test_an_image_is_read_once_for_many_questions",
    ),
    "output projection transposed": Fault(
        "export/weights/expressions.py",
        "return self.of.compute(reading).t()",
        'return self.of.compute(reading).t() if "o_proj" not in str(self) else '
        "self.of.compute(reading)",
        TIED,
    ),
    "merged states not divided by the sum of their weights": Fault(
        "export/ops/token_merge/function.py",
        "return g.Div(weight, g.ReduceSum(weight, g.const([2]), keepdims=1))",
        "return weight",
        "tests/export/ops/test_token_merge.py::test_onnx_function_matches_loops",
    ),
    "the same in the torch reference": Fault(
        "export/ops/token_merge/contract.py",
        "    share = share / share.sum(dim=1, keepdim=True)\n",
        "",
        "tests/export/ops/test_token_merge.py::test_reference_matches_loops",
    ),
    "the newest entry overwritten instead of the oldest": Fault(
        "runtime/kv/slot_counts.py",
        "self.slots[(*np.nonzero(where), self.head[where])]",
        "self.slots[(*np.nonzero(where), "
        "((self.head + self.count - 1) % self.slots.shape[2])[where])]",
        "tests/runtime/kv/test_cache_eviction.py::test_victims_by_hand",
    ),
    "the most important entries evicted": Fault(
        "export/ops/cache_compact/contract.py",
        "argsort(descending=True, stable=True)\n    return ranked",
        "argsort(stable=True)\n    return ranked",
        "tests/export/ops/test_cache_compact.py::test_matches_loops",
    ),
    "one image token too many": Fault(
        "runtime/kv/image_tokens.py",
        "return max(1, rounded(image_tokens * ratio))",
        "return min(image_tokens, max(1, rounded(image_tokens * ratio)) + 1)",
        "tests/runtime/kv/test_image_tokens.py::test_kept_is_the_rounded_share_but_at_least_one",
    ),
    "image tokens scored by queries one too early": Fault(
        "export/recipes/parts/pyramid.py",
        "rows = state.last()[:, None] - slots",
        "rows = state.last()[:, None] - 1 - slots",
        TWIN,
    ),
    "sums of attention that stand still in decode": Fault(
        "export/graphs/attention_received.py",
        "received[:, 0, :, 0] + found[:, 1:] if sums",
        "received[:, 0, :, 0] if sums",
        "tests/naive/test_naive_twins.py::test_compositions",
    ),
    "scores of tova that keep what a token before attended to": Fault(
        "export/graphs/attention_received.py",
        "if sums else found[:, 1:]",
        "if sums else torch.maximum(received[:, 0, :, 0], found[:, 1:])",
        "tests/naive/test_naive_twins.py::test_compositions",
    ),
    "scores of snapkv pooled with its own window's": Fault(
        "export/recipes/parts/score_graphs.py",
        "before = torch.where(places < end[:, None], found, 0)",
        "before = torch.where(places < places.shape[0], found, 0)",
        "tests/naive/test_naive_twins.py::test_compositions",
    ),
    "the last sink of streaming-llm leaves": Fault(
        "runtime/policies/evictions.py",
        "return np.full_like(kept, sinks, np.int64)",
        "return np.full_like(kept, max(0, sinks - 1), np.int64)",
        "tests/runtime/kv/test_budgets.py::test_the_oldest_after_the_sinks_leaves",
    ),
    "a frequency penalty that counts a token once": Fault(
        "runtime/sampling/logits_processors.py",
        "self._counts[token] += 1",
        "self._counts[token] = 1",
        f"{CHOICES}::test_scores_and_chances_are_those_of_a_plain_implementation",
    ),
    "a bias behind the penalty on repetition": Fault(
        "runtime/sampling/logits_processors.py",
        "            scores = self._biased(scores)\n",
        "            return self._biased(self._penalised(scores))\n",
        f"{CHOICES}::test_a_bias_is_scaled_as_the_logit_it_is_added_to",
    ),
    "a stop token before min_new_tokens": Fault(
        "runtime/sampling/logits_processors.py",
        "{*config.eos_ids, *params.stop_token_ids}",
        "{*config.eos_ids}",
        f"{CHOICES}::test_at_temperature_0_too",
    ),
    "the checkpoint's temperature before the caller's": Fault(
        "runtime/options/checkpoint_defaults.py",
        "for n, v in theirs.items() if getattr(options, n) is None",
        "for n, v in theirs.items() if not getattr(options, n)",
        "tests/parity/sampling/test_checkpoint_defaults.py::test_a_greedy_call_stays_one",
    ),
    "all answers to a prompt drawn from one seed": Fault(
        "runtime/sampling/settings.py",
        "None if self.seed is None else self.seed + number",
        "self.seed",
        "tests/runtime/engine/test_several_answers.py::"
        "test_four_answers_are_those_of_four_lone_calls[none]",
    ),
    "handles kept for ever, for a fork that may come": Fault(
        "core/forks.py",
        "_orphans: weakref.WeakSet[Orphan] = weakref.WeakSet()",
        "_orphans: set[Orphan] = set()",
        "tests/runtime/engine/test_engine_memory.py::test_nothing_grows",
    ),
    "a state is that after a row's padding": Fault(
        "export/graphs/blocks.py",
        "            at = self.last[:, None] + 1 + torch",
        "            at = (0 * self.last + new.shape[1])[:, None] + torch",
        f"{PARITY}[lfm2-vl:gqa-conv-first]",
    ),
    "extend: a row with no entries goes on from another's state": Fault(
        "export/graphs/blocks.py",
        "there = before[:, None, None, None] > 0",
        "there = before[:, None, None, None] >= 0",
        "tests/runtime/engine/test_engine_states.py"
        "::test_answers_beside_others_are_those_alone[17]",
    ),
    "a row's states used for a shorter beginning": Fault(
        "runtime/engine/slots.py",
        "if n == len(held[row].keys)}",
        "if n}",
        "tests/runtime/engine/test_engine_slots.py::TestRowsWithStates::runTest",
    ),
    "a step with states run again": Fault(
        "runtime/kv/cache.py",
        "return self.sums or bool(self.states)",
        "return self.sums",
        "tests/runtime/engine/test_engine_states.py::test_a_step_that_failed_is_not_run_again",
    ),
    "scales of int8 entries by their largest number, not magnitude": Fault(
        "export/ops/parts/int8_entries.py",
        "least = x.abs().amax(-1, keepdim=True)",
        "least = x.amax(-1, keepdim=True)",
        "tests/export/ops/test_int8_entries.py"
        "::test_numbers_are_rounded_to_half_a_step_and_then_stay",
    ),
    "newest entry of an int8 cache not seen": Fault(
        "export/targets/passes/ort_int8_cache.py",
        "g.LessOrEqual(g.arange(longest), last)",
        "g.Less(g.arange(longest), last)",
        "tests/parity/test_int8_cache.py::test_logits_are_those_of_torch_with_a_rounded_cache"
        "[h2o-lowered]",
    ),
    "learned positions shrunk without antialiasing": Fault(
        "export/families/parts/lfm2_vision.py",
        "reach = step.clamp(min=1.0)[..., None]",
        "reach = torch.ones_like(step)[..., None]",
        "tests/export/families/test_family_lfm2_vl.py"
        "::test_learned_positions_are_stretched_as_torch_does",
    ),
    "patches of a tile's padding seen": Fault(
        "export/families/parts/lfm2_vision.py",
        "seen = (places[..., 0] >= 0)",
        "seen = (places[..., 0] >= -1)",
        f"{PARITY}[lfm2-vl:gqa-conv-first]",
    ),
    "padding is written into the matrices of linear attention": Fault(
        "export/ops/gated_delta_rule/function.py",
        "split(g.Where(valid, x, zero), groups, 3)",
        "split(x, groups, 3)",
        "tests/export/ops/test_gated_delta_rule.py::test_padding_changes_nothing",
    ),
    "halves of a chunk's system taken for independent": Fault(
        "export/ops/gated_delta_rule/function.py",
        "for number in range(1, size.bit_length()):",
        "for number in range(1, size.bit_length() - 1):",
        "tests/export/ops/test_gated_delta_rule.py::test_pieces_go_on_from_the_state[1]",
    ),
    "matrices not faded before they are corrected": Fault(
        "export/ops/gated_delta_rule/contract.py",
        "wrong = value.float() - (state * key).sum(-2)",
        "wrong = value.float() - (state / decay.exp()[..., None, None] * key).sum(-2)",
        "tests/export/ops/test_gated_delta_rule.py::test_the_reference_is_transformers_rule",
    ),
    "last stage of the pyramid too late": Fault(
        "export/recipes/lightvlm.py",
        "(1 / 14, 2 / 7, 1 / 2)",
        "(1 / 14, 2 / 7, 2 / 3)",
        TWIN,
    ),
}
# In a normal run: one that needs no export, which would be one of the broken package's own.
USUAL = ("the newest entry overwritten instead of the oldest",)
