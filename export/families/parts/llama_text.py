"""Parts that families share: checks of config.json, Llama-like text models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from lvlm.core.errors import CheckpointError
from lvlm.export.families.parts.leaf_tables import Kinds, rope_types
from lvlm.export.families.parts.side_files import load_tokenizer, read_json
from lvlm.export.graphs.language_model import LanguageLayer, LanguageModel, LayerState
from lvlm.export.leaves import ATTENTION, HasLeaves, leaves_of

# Of a text model's and a vision tower's configuration
SIZES = (
    *("hidden_size", "intermediate_size", "head_dim", "vocab_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "patch_size", "image_size"),
    *("spatial_merge_size", "temporal_patch_size"),
)


def one_of(family: str, what: str, value: Any, supported: Sequence[object]) -> None:
    if value not in supported:
        raise CheckpointError(
            f"{what} '{value}' is not supported; family {family} has {tuple(supported)}"
        )


def section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of config.json, {} where there is none; CheckpointError if it is no object."""
    found = raw.get(name) or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"config.json: {name} is {str(found)[:80]}, not an object")
    return found


def refuse_quantized(raw: Mapping[str, Any], at: str = "") -> None:
    """CheckpointError where config.json, or a part of it, says that the weights are quantized."""
    for name, value in raw.items():
        if name in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            how = f" with {str(method)[:40]}" if method else ""
            raise CheckpointError(
                f"the checkpoint is quantized{how} ({at}{name} in config.json); "
                "export the original weights"
            )
        if isinstance(value, Mapping) and name.endswith("_config"):
            refuse_quantized(value, f"{at}{name}.")


def read_common(
    family: str,
    kind: Any,
    raw: Mapping[str, Any],
    texts: Kinds,
    text_type: str,
    towers: Kinds | None = None,
    tower_type: str = "",
) -> Any:
    """config.json as transformers' configuration class ``kind``.

    Args:
        texts: the text models that there may be; the types of rotary tables follow from their
            leaf modules
        text_type: the text model's where the config names none
        towers: likewise the vision towers; None: only one goes with ``kind``

    Raises:
        CheckpointError
    """
    text = section(raw, "text_config")
    if towers is not None:
        tower = section(raw, "vision_config").get("model_type", tower_type)
        one_of(family, "vision tower", tower, tuple(towers))
    found = text.get("model_type", text_type)
    one_of(family, "text backbone", found, tuple(texts))
    refuse_quantized(raw)
    # Older configurations call the table of rotary parameters rope_scaling, its kind type.
    rope = section(text, "rope_parameters") or section(text, "rope_scaling")
    own = [table for table in rope.values() if isinstance(table, Mapping)]  # of types of layers
    for table in own or [rope]:
        rope_type = table.get("rope_type") or table.get("type") or "default"
        one_of(family, "rope_type", rope_type, rope_types(texts[found]))
    try:
        config = kind.from_dict(dict(raw))
    except Exception as error:  # transformers' own checks raise types of several packages
        reason = " ".join(str(error).split())
        raise CheckpointError(f"config.json is not valid: {reason}") from None
    for part in ("text_config", "vision_config"):
        _check_sizes(part, getattr(config, part, None))
    return config


def _check_sizes(part: str, config: Any) -> None:
    """CheckpointError where a size that others are divided by, or that something has, is none."""
    for name in SIZES:
        found = getattr(config, name, None)
        for value in found if isinstance(found, list | tuple) else [found]:
            if value is not None and (not isinstance(value, int) or value < 1):
                raise CheckpointError(
                    f"{part}.{name} {found} in config.json is not supported; it must be 1 or more"
                )


def build_model(kind: Any, config: Any) -> nn.Module:
    """A model of transformers' class ``kind`` with our attention, in torch's default dtype."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # or it warns that an attention it does not know has no windows
    try:
        model = kind._from_config(
            config, attn_implementation=ATTENTION, dtype=torch.get_default_dtype()
        )
    finally:
        logging.set_verbosity(level)
    assert isinstance(model, nn.Module)
    return model


def language_model(
    family: HasLeaves,
    parts: Any,
    head: nn.Module,
    text: Any,
    states: tuple[LayerState, ...] = (),
) -> LanguageModel:
    """A Llama-like text model of a family from transformers' module ``parts`` and its
    configuration; ``states`` are those of layers that have no attention. CheckpointError names an
    attention that is not among the family's leaves."""
    leaves = leaves_of(family)
    attends = [hasattr(layer, "self_attn") for layer in parts.layers]
    return LanguageModel(
        embed=parts.embed_tokens,
        layers=[
            LanguageLayer(layer, parts.rotary_emb, leaves.window(layer.self_attn))
            if here
            else LanguageLayer(layer, parts.rotary_emb, states=states)
            for layer, here in zip(parts.layers, attends, strict=True)
        ],
        norm=parts.norm,
        head=head,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        scale=float(parts.layers[attends.index(True)].self_attn.scaling),
        positions=model_positions(text),
    )


def model_positions(text: Any) -> int:
    """The longest position; where rotary angles are scaled, some configurations have the length
    before scaling."""
    own, rope = int(text.max_position_embeddings), text.rope_parameters
    before = rope.get("original_max_position_embeddings") or own
    return max(own, int(before * (rope.get("factor") or 1)))


def preprocessor(folder: Path) -> dict[str, Any]:
    """The image processor's config, wherever a checkpoint keeps it."""
    processor = read_json(folder / "processor_config.json").get("image_processor")
    return processor or read_json(folder / "preprocessor_config.json", required=True)


def video_preprocessor(folder: Path) -> dict[str, Any]:
    """The video processor's config; older checkpoints have the image processor's for both."""
    own = read_json(folder / "processor_config.json").get("video_processor")
    own = own or read_json(folder / "video_preprocessor_config.json")
    return own or read_json(folder / "preprocessor_config.json")


def token_text(folder: Path, token_id: int) -> str:
    """A token of config.json, that of images or of videos, as prompts have it."""
    token = load_tokenizer(folder).added_tokens_decoder.get(token_id)
    if token is None:
        raise CheckpointError(
            f"the tokenizer has no added token {str(token_id)[:40]}, which config.json names for "
            "images; the folder mixes files of two models"
        )
    return str(token.content)


def added_token(folder: Path, name: str, default: str) -> str:
    """A token that tokenizer_config.json names, as ``extra_special_tokens`` or beside them."""
    config = read_json(folder / "tokenizer_config.json")
    extra = config.get("extra_special_tokens")
    named = (extra if isinstance(extra, dict) else {}).get(name) or config.get(name) or default
    return str(named.get("content") if isinstance(named, dict) else named)


# Of tiny configurations


def heads(heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def tiny(kind: Any, text: Any, vision: Any, **options: Any) -> Any:
    """A configuration of class ``kind`` for the special tokens of tiny-llava's tokenizer."""
    text.bos_token_id, text.eos_token_id, text.pad_token_id = 1, 2, 0
    options = {"tie_word_embeddings": False} | options
    text.tie_word_embeddings = options["tie_word_embeddings"]
    return kind(
        text_config=json.loads(text.to_json_string(use_diff=False)),
        vision_config=json.loads(vision.to_json_string(use_diff=False)),
        **options,
    )


def tiny_tokenizer(*tokens: str) -> str:
    """tiny-llava's tokenizer.json with more special tokens."""
    data = _tiny_tokenizer()
    for token_id, token in enumerate(tokens, tiny_token(0)):
        data["added_tokens"].append({**data["added_tokens"][-1], "id": token_id, "content": token})
    return json.dumps(data)


def tiny_token(number: int) -> int:
    """The id that tiny_tokenizer gives to the token of that number."""
    return int(max(_tiny_tokenizer()["model"]["vocab"].values()) + 1 + number)


def _tiny_tokenizer() -> Any:
    return json.loads((resources.files("lvlm.assets") / "tiny-llava/tokenizer.json").read_text())
