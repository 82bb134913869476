"""The small files beside a checkpoint's weights, read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from lvlm.core.errors import BundleError, CheckpointError
from lvlm.export.families.family import PromptFiles
from lvlm.export.families.parts.generation_file import honoured, read_generation_config
from lvlm.runtime.prompt.text import Tokenizer

READ = (
    *("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"),
    *("special_tokens_map.json", "chat_template.json"),
)
OLDER = (("vocab.json", "merges.txt"), ("tokenizer.model",))  # without a tokenizer.json
COPIED = (  # tokenizer.json is written as transformers has loaded it
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """The object in a JSON file; {} if it is missing and not required."""
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path.parent} has no {path.name}; is the checkpoint complete?")
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return data


def prompt_files(folder: Path, text_config: Any) -> PromptFiles:
    """The runtime's files from a checkpoint's small files as transformers reads them: the tokenizer
    with every token that any of them lists, chat template, named special tokens, how tokens are
    chosen and when a text ends. Raises CheckpointError."""
    for name in READ:
        read_json(folder / name)  # what cannot be read is named
    tokenizer = load_tokenizer(folder)
    config = _asked(folder, "generation_config.json", lambda: read_generation_config(folder))
    template = _asked(
        folder,
        "chat template",
        lambda: ProcessorMixin.get_processor_dict(str(folder))[0].get("chat_template"),
    )
    return PromptFiles(
        tokenizer=tokenizer.backend_tokenizer.to_str(),
        chat_template=_default(folder, template or tokenizer.chat_template),
        special_tokens=dict(tokenizer.special_tokens_map),
        eos_ids=_eos_ids(folder, config, text_config, tokenizer),
        generation=honoured(config, folder),
        files=tuple(name for name in COPIED if (folder / name).is_file()),
    )


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer, from tokenizer.json or from what older checkpoints have instead.
    Raises CheckpointError."""
    if (folder / "tokenizer.json").is_file():
        _check_tokenizer(folder / "tokenizer.json")
    elif not any(all((folder / name).is_file() for name in names) for names in OLDER):
        # transformers would make an empty one
        raise CheckpointError(
            f"{folder} has no tokenizer.json, nor {', nor '.join(map(' and '.join, OLDER))}; "
            "is the checkpoint complete?"
        )
    try:
        # Mistral's would be another class where mistral-common is installed, without a fast form
        tokenizer = _asked(
            folder, "tokenizer", lambda: AutoTokenizer.from_pretrained(folder, mistral_format=False)
        )
    except CheckpointError as error:
        if (folder / "tokenizer.json").is_file():
            raise
        kind = str(read_json(folder / "tokenizer_config.json").get("tokenizer_class"))[:60]
        raise CheckpointError(
            f"{error}; there is no tokenizer.json: write one with transformers, "
            f"{kind}.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ) from None
    _check_loaded(folder, tokenizer)
    return tokenizer


def _asked(folder: Path, what: str, load: Callable[[], Any]) -> Any:
    """The answer of transformers, quietly, or one line of why it cannot."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            return load()
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{folder}: transformers cannot load the {what}: {reason}") from None
    finally:
        logging.set_verbosity(level)


def _check_tokenizer(path: Path) -> None:
    try:
        Tokenizer(path, ())
    except BundleError as error:
        reason = str(error).removesuffix("; export the bundle again")
        raise CheckpointError(f"{reason}; is the checkpoint complete?") from None


def _check_loaded(folder: Path, tokenizer: Any) -> None:
    """Refuse what the runtime, which has no transformers, does not do."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        kind = type(tokenizer).__name__
        raise CheckpointError(f"{folder}: {kind} has no fast form; save one with save_pretrained")
    if getattr(tokenizer, "split_special_tokens", False):
        raise CheckpointError(
            f"{folder}/tokenizer_config.json says split_special_tokens, so that no image can "
            "have a place in a prompt; remove it"
        )
    model = type(tokenizer.backend_tokenizer.model).__name__
    if tokenizer.clean_up_tokenization_spaces and model != "BPE":
        raise CheckpointError(
            f"{folder}/tokenizer_config.json says clean_up_tokenization_spaces, which a bundle "
            "does not do; set it to false"
        )


def _default(folder: Path, template: object) -> str | None:
    """The template that is used when nobody names one: of several, that called default."""
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named or None
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(sorted(map(str, template)))[:200]
            raise CheckpointError(
                f"{folder} has chat templates named {names}, none of them default; rename the one "
                "to be used"
            )
        template = template["default"]
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{folder}: its chat template is no text")
    return template


def _eos_ids(folder: Path, config: Any, text_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a text for transformers' generate; where nothing does, what the tokenizer and
    the text model call the end."""
    found: list[object] = [config.eos_token_id]
    raw = read_json(folder / "config.json")
    inner = raw.get("text_config")
    found += [
        raw.get("eos_token_id"),
        (inner if isinstance(inner, dict) else {}).get("eos_token_id"),
    ]
    found += [tokenizer.eos_token_id, getattr(text_config, "eos_token_id", None)]
    eos = next((ids for ids in found if ids is not None and ids != []), ())
    ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise CheckpointError(f"{folder}: eos_token_id is {str(eos)[:60]}; give token numbers")
    return ids
