"""Rounding on samples, block by block: what each block gets, against transformers' own forward
pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parity_tools import load_torch, make_reference
from torch import nn

from lvlm.export.budgets.calibration_samples import CalibrationSample, builtin_samples
from lvlm.export.budgets.sample_prompts import prepare, prompt_maker
from lvlm.export.checkpoint.checkpoint import Checkpoint, find_family
from lvlm.export.reference.passing_prompt import PassingPrompt
from lvlm.export.reference.rounded_blocks import RoundedBlocks
from lvlm.export.weights.gptq_rounding import Moments
from lvlm.export.weights.packed_linears import dense
from lvlm.export.weights.quantization import WeightQuantization, linear_weights, linears_of
from lvlm.runtime.prompt.prompts import Prompt

SMALL = "llava:qwen2-tied-siglip"
HOW = WeightQuantization(4, 16)


def prompts_of(folder: Path, samples: int) -> list[Prompt]:
    """Some with an image, and one without."""
    source = Checkpoint(folder, "", None)
    family = find_family(source.config, "")
    maker = prompt_maker(source, family, family.read_config(source.config))
    text = CalibrationSample((), "Which digits are there, and where?", "text")
    return [prepare(maker, sample) for sample in (*builtin_samples()[:samples], text)]


@pytest.mark.parametrize("name", ["qwen3-vl:gqa", "qwen2-vl:gqa", SMALL])
def test_a_prompt_behind_all_blocks_is_that_of_the_reference(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    """With features that enter later blocks, with three positions a token, with neither."""
    reference = make_reference(checkpoint(name), "none")
    language = reference.language
    for prompt in prompts_of(checkpoint(name), 1):
        passing = PassingPrompt(reference, prompt)
        for number in range(len(language.blocks)):
            passing.pass_block(number)
        with torch.no_grad():
            logits = language.head(language.norm(passing.hidden[:, -1:]))[0, 0]
        answer = reference.generate(prompt, reference.encode(prompt.images), max_new_tokens=1)
        torch.testing.assert_close(logits, answer.logits[0], atol=1e-4, rtol=1e-4)


def test_a_block_is_rounded_for_what_it_gets_from_rounded_ones(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint(SMALL)
    prompts = prompts_of(folder, 2)
    found = RoundedBlocks(HOW, torch.float32, tmp_path).of(make_reference(folder, "none"), prompts)

    theirs = load_torch(folder)
    family = find_family(Checkpoint(folder, "", None).config, "")
    language = family.language(theirs, theirs.config)
    names = {id(p): name for name, p in linear_weights(theirs, language).items()}
    second = {names[id(linear.weight)]: linear for linear in linears_of(language.blocks[1])}

    def moments_of_second() -> dict[str, Moments]:
        moments = {name: Moments(linear.in_features) for name, linear in second.items()}

        def watch(name: str) -> Callable[..., None]:
            return lambda _, given: moments[name].add(given[0])

        hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in second.items()]
        with torch.no_grad():
            for prompt in prompts:
                theirs(torch.tensor([list(prompt.ids)]), **family.transformers_inputs(prompt))
        for hook in hooks:
            hook.remove()
        return moments

    before = moments_of_second()
    for linear in linears_of(language.blocks[0]):
        linear.weight = nn.Parameter(dense(found[names[id(linear.weight)]]), requires_grad=False)
    behind = moments_of_second()
    for name, linear in second.items():
        far = (behind[name].sum - before[name].sum).norm() / before[name].sum.norm()
        assert far > 1e-3, name  # rounding changes what it gets
        rounded = behind[name].weighing().gptq(linear.weight, HOW, torch.float32)
        alike = (rounded.dense(4) == dense(found[name])).float().mean()
        assert alike > 0.99, (name, float(alike))
        other = before[name].weighing().gptq(linear.weight, HOW, torch.float32)
        assert (other.dense(4) == dense(found[name])).float().mean() < alike, name
