"""A video, and what transformers takes for it."""

from __future__ import annotations

import numpy as np
import torch

from lvlm.runtime.media.video import Video
from lvlm.runtime.prompt.prompts import Prompt


def noise_video(frames: int = 5, fps: float = 4.0, height: int = 40, width: int = 70) -> Video:
    rng = np.random.default_rng(frames * height)
    return Video.of(list(rng.integers(0, 256, (frames, height, width, 3), np.uint8)), fps)


def inputs(prompt: Prompt, family: str, source: Video) -> dict[str, torch.Tensor]:
    """What transformers takes for a prompt with a video and nothing else in it."""
    pixels = [torch.from_numpy(p.arrays["pixel_values"]) for p in prompt.images]
    if family == "smolvlm":
        return {"pixel_values": torch.cat(pixels)[None]}
    if family == "llava-onevision":
        return {"pixel_values_videos": torch.cat(pixels)[None]}
    grid = [len(pixels), *(prompt.images[0].arrays["position_ids"].max((0, 1)) + 1)]
    found = {
        "pixel_values_videos": torch.cat([x.flatten(0, 1) for x in pixels]),
        "video_grid_thw": torch.tensor([grid]),
        "mm_token_type_ids": 2 * torch.from_numpy(prompt.image_id > 0).int()[None],
    }
    if family == "qwen2.5-vl":
        found["second_per_grid_ts"] = torch.tensor([2 / source.fps])
    return found
