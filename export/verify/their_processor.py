"""The processor of a checkpoint's model in transformers, where it can be loaded, and what it asks
its image processor for, where it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from lvlm.export.families.parts.side_files import read_json


def processor_class(config: Any) -> Any:
    """The processor class of the configuration's type; a vision tower may have one of its own."""
    tower = getattr(getattr(config, "vision_config", None), "model_type", "")
    names = PROCESSOR_MAPPING_NAMES
    return getattr(transformers, names[tower if tower in names else config.model_type])


def load_processor(kind: Any, folder: Path) -> tuple[Any, str]:
    """The folder's processor where transformers has it whole; else None and the reason."""
    try:
        with quiet():
            found = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # often a package that only videos need
        return None, " ".join(str(error).split()).partition(". ")[0][:160]
    if type(found) is not kind:  # guessed from a folder that names none
        return None, f"the folder names {type(found).__name__}, the model has {kind.__name__}"
    if "patch_size" in vars(found) and found.patch_size is None:
        return None, "the folder has no processor_config.json"
    return found, ""


def image_options(kind: Any, folder: Path) -> dict[str, Any]:
    """Options that the processor gives its image processor: by default, and by its file."""
    try:
        kwargs = getattr(getattr(kind, "valid_processor_kwargs", None), "_defaults", {})
        found = dict(kwargs.get("images_kwargs") or getattr(kind, "images_kwargs", None) or {})
    except ImportError:  # the class needs what is not installed
        found = {}
    if kind.__name__ == "PixtralProcessor":  # images of whole tokens, whatever their own file says
        file = read_json(folder / "processor_config.json")
        found["patch_size"] = file.get("patch_size", 16) * file.get("spatial_merge_size", 1)
    return {key: value for key, value in found.items() if key != "return_tensors"}


@contextmanager
def quiet() -> Iterator[None]:
    """Neither transformers' warnings nor its progress: what matters is compared."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
