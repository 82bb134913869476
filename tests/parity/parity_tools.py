"""Prompts, and the models that bundles are compared with."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from settings import ASSETS
from transformers import AutoModelForImageTextToText

from lvlm.core.discovery import discover
from lvlm.export.checkpoint.checkpoint import Checkpoint, find_family
from lvlm.export.recipes.recipe import parse_settings
from lvlm.export.reference.torch_reference import Reference
from lvlm.runtime.bundle.reader import read_bundle

IMAGE = "<image>\n"
IMAGES = [np.asarray(Image.open(ASSETS / f"samples/digits-{i}.png")) for i in (1, 2)]
# Prompts of different length: one image, two, none, and text between two.
ROWS: list[tuple[str, list[np.ndarray]]] = [
    (f"USER: {IMAGE}Describe the picture. ASSISTANT:", IMAGES[:1]),
    (f"USER: {IMAGE}{IMAGE}Read the top row. ASSISTANT:", IMAGES),
    ("USER: How often does 7 appear? ASSISTANT:", []),
    (f"USER: {IMAGE}and {IMAGE}Which digit is in the top row? ASSISTANT:", IMAGES[::-1]),
]


def load_torch(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def canonical(folder: Path, copy: Path) -> Path:
    """The bundle as it runs where nothing is lowered."""
    shutil.copytree(folder, copy)
    manifest = read_bundle(copy, verify="none")
    graphs = {n: dataclasses.replace(g, lowered={}) for n, g in manifest.graphs.items()}
    dataclasses.replace(manifest, graphs=graphs).write(copy)
    return copy


def make_reference(folder: Path, recipe: str, *settings: str) -> Reference:
    source = Checkpoint(folder, "", None)
    family = find_family(source.config, "")
    config = family.read_config(source.config)
    parsed = parse_settings(discover("lvlm.export.recipes", "RECIPE")[recipe], settings)
    theirs = load_torch(folder)
    theirs.set_attn_implementation("lvlm")
    return Reference(family, config, theirs, parsed)
