"""A model without its weights: what graphs are traced from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lvlm.export.graphs.language_model import LanguageModel


@dataclass(frozen=True)
class Skeleton:
    """A checkpoint's model with fake parameters and real (small) buffers, built once per export.

    model     in transformers' own class
    language  its text model's parts, over the same parameters
    vision    its vision tower likewise
    dtype     of the parameters
    mode      that makes them fake; what is traced with them is traced in it
    """

    model: nn.Module
    language: LanguageModel
    vision: nn.Module
    dtype: torch.dtype
    mode: FakeTensorMode
