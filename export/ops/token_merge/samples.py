"""Sample inputs of ``lvlm::TokenMerge``, and the host's side of its contract: counts to slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lvlm.export.ops.op import Attribute, OpSample

Counts = Sequence[Sequence[int]]  # [row][image]
PAD, T = -1, 0


def inputs(
    hidden: torch.Tensor,
    importance: torch.Tensor,
    image_id: torch.Tensor,
    positions: torch.Tensor,
    keep: Counts,
    recycle: Counts | None,
) -> tuple[torch.Tensor | None, ...]:
    """The op's inputs in order; the slots are as many as these counts need. Without ``recycle``,
    those of the rules that have none."""
    kept = torch.tensor(keep)
    length = int(((image_id == T).sum(1) + kept.sum(1)).max())
    slots = [torch.arange(max(1, n)) for n in (int(kept.max()), length)]
    given = hidden, importance, image_id, positions, kept, *slots
    if recycle is None:
        return *given, None, None
    centres = torch.tensor(recycle)
    return *given, centres, torch.arange(max(1, int(centres.max())))


def samples() -> Iterator[OpSample]:
    """Every layout under every rule, in fp32 and fp16; positions are [B, N] and [3, B, N]."""
    one = [T, T, *[1] * 10, T, T, T]  # odd length: 15
    ragged = [
        [*one, *[PAD] * 4],
        [T, *[1] * 6, T, *[2] * 7, T, T, T, T],
        [*[PAD] * 8, *[T] * 11],  # left padding, and no image
    ]
    ends = [[T, *[1] * 8], [T, T, *[1] * 4, PAD, PAD, PAD]]  # the last valid token is an image's
    layouts: dict[str, tuple[list[list[int]], Counts, Counts]] = {
        "one image": ([one], [[6]], [[2]]),
        "ragged, two images": (ragged, [[5, 0], [4, 3], [0, 0]], [[1, 0], [2, 1], [0, 0]]),
        "keep one": ([one], [[1]], [[0]]),
        "keep all": ([one], [[10]], [[2]]),
        "last token is an image's": (ends, [[3], [2]], [[1], [1]]),
        "ties": ([one], [[5]], [[2]]),
        "zero importance": ([one], [[4]], [[2]]),
        "no image at all": ([[T] * 5], [[0]], [[0]]),
    }
    for seed, (name, (ids, keep, recycle)) in enumerate(layouts.items()):
        random = torch.Generator().manual_seed(seed)
        image_id = torch.tensor(ids)
        hidden = torch.randn(*image_id.shape, 24, generator=random)
        hidden[image_id == PAD] = float("nan")  # padding is never looked at
        importance = torch.rand(image_id.shape, generator=random)
        positions = torch.arange(image_id.shape[1]).expand_as(image_id) + 3
        if name == "ties":
            importance = (importance * 3).floor() / 4
        if name == "zero importance":
            importance *= 0
        if "two images" in name or "keep" in name:
            positions = torch.stack((positions, positions // 2, positions % 4))
        for dtype in (torch.float32, torch.float16):
            state = hidden.to(dtype)
            label = f"{name}, {str(dtype)[6:]}"
            for rule in ("recycle", "nearest", "illava", "drop"):
                attributes: dict[str, Attribute] = {"merge": rule}
                if rule in ("recycle", "illava") and name == "ties":
                    attributes["absorb"] = 1
                counts = recycle if rule in ("recycle", "illava") else None
                yield OpSample(
                    f"{label}, {rule}",
                    inputs(state, importance, image_id, positions, keep, counts),
                    attributes,
                )
