"""Linear layers rounded on samples, block by block: each block's for what they get from blocks that
are rounded already, then the head.

In memory are the weights of one block, the moments of its inputs, and what lies between two blocks
of all samples. Rounded weights go to files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lvlm.export.checkpoint.checkpoint_form import Read
from lvlm.export.checkpoint.quantized.parts.packed_tensor import PackedTensor, Unpacked
from lvlm.export.checkpoint.weight_readers import open_weights
from lvlm.export.graphs.language_model import LanguageModel
from lvlm.export.reference.passing_prompt import PassingPrompt
from lvlm.export.reference.torch_reference import Reference
from lvlm.export.weights.gptq_rounding import Moments
from lvlm.export.weights.packed_weights import pack, unpack
from lvlm.export.weights.quantization import WeightQuantization, linear_weights, linears_of
from lvlm.export.weights.stored_weights import weight_rows
from lvlm.runtime.prompt.prompts import Prompt

AT_ONCE = 1024  # rows that go through the head's norm at a time
FACTORS = 4  # matrices [K,K] at a time, from moments to their factor


@dataclass(frozen=True)
class RoundedBlocks:
    """Rounds a model's linear layers into files of ``folder``.

    how     of the bundle; ``scales`` is the dtype that it has scales in
    tell    gets the number of the block that is read, and of how many
    """

    how: WeightQuantization
    scales: torch.dtype
    folder: Path
    tell: Callable[[int, int], None] = lambda *_: None

    @torch.no_grad()
    def of(self, reference: Reference, prompts: Sequence[Prompt]) -> dict[str, PackedTensor]:
        """The rounded weights by their parameters in ``linear_weights``; the reference's model is
        used up. Raises ExportError where it computes no finite numbers."""
        language, found = reference.language, dict[str, PackedTensor]()
        weights = linear_weights(reference.model, language)
        names = {id(parameter): name for name, parameter in weights.items()}
        passing = [PassingPrompt(reference, prompt) for prompt in prompts]
        for number, block in enumerate(language.blocks):
            self.tell(number + 1, len(language.blocks))
            inside = linears_of(block)
            with watched(inside) as moments:
                for prompt in passing:
                    prompt.through(number)
            path = self.folder / f"block-{number:05d}.safetensors"
            for linear in inside:
                moments.setdefault(linear, Moments(linear.in_features))  # of one that got nothing
            found |= self._rounded({names[id(m.weight)]: m for m in inside}, moments, path)
            for prompt in passing:
                prompt.pass_block(number)
            for linear in inside:
                linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        head = language.head
        if isinstance(head, nn.Linear):
            moments = {head: Moments(head.in_features)}
            for prompt in passing:
                for rows in torch.split(prompt.hidden[0], AT_ONCE):
                    moments[head].add(language.norm(rows[None]))
            path = self.folder / "head.safetensors"
            found |= self._rounded({names[id(head.weight)]: head}, moments, path)
        return found

    def _rounded(
        self, linears: Mapping[str, nn.Linear], moments: Mapping[nn.Linear, Moments], path: Path
    ) -> dict[str, PackedTensor]:
        """The layers with rounded weights in their place, and these in a file."""
        found, stored = {}, {}
        together: dict[int, list[str]] = {}
        for name, linear in linears.items():
            together.setdefault(id(moments[linear]), []).append(name)
        for members in together.values():
            inputs = moments[linears[members[0]]].weighing()
            for name in members:
                linear = linears[name]
                parts = [inputs.gptq(w, self.how, self.scales) for w in weight_rows(linear)]
                numbers = torch.cat([part.numbers for part in parts])
                made = Unpacked(numbers, torch.cat([part.scales for part in parts]), None)
                linear.__class__ = nn.Linear
                linear.weight = nn.Parameter(made.dense(self.how.bits), requires_grad=False)
                stored[f"{name}.numbers"] = torch.from_numpy(pack(made.numbers, self.how.bits))
                stored[f"{name}.scales"] = made.scales
                shape, groups = (linear.out_features, linear.in_features), made.scales.shape[1]
                read = partial(_read, path, name, self.how.bits)
                found[name] = PackedTensor(shape, self.how.bits, groups, True, read)
        save_file(stored, path)
        return found


@contextmanager
def watched(linears: Sequence[nn.Linear]) -> Iterator[dict[nn.Linear, Moments]]:
    """Inputs that the layers get meanwhile; those that get the very same share their moments."""
    found: dict[nn.Linear, Moments] = {}
    last: list[Any] = [None, None]  # what the layer before this one got, its moments

    def watch(linear: nn.Linear, given: tuple[torch.Tensor, ...]) -> None:
        if given[0] is last[0]:
            found[linear] = last[1]
            return
        moments = found[linear] = found.get(linear) or Moments(linear.in_features)
        moments.add(given[0])
        last[:] = given[0], moments

    hooks = [linear.register_forward_pre_hook(watch) for linear in linears]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def rounding_memory(language: LanguageModel) -> int:
    """Bytes in memory beside the running model, the samples' ``hidden`` aside: moments of a block's
    layers and the factor of one, counted as if no two layers got the same."""
    blocks = ([m.in_features**2 for m in linears_of(block)] for block in language.blocks)
    return 4 * max(sum(inside) + FACTORS * max(inside) for inside in blocks)


def _read(path: Path, name: str, bits: int, _: Read) -> Unpacked:
    with open_weights(path) as file:
        numbers = unpack(file.get_tensor(f"{name}.numbers"), bits)
        return Unpacked(numbers, file.get_tensor(f"{name}.scales"), None)
