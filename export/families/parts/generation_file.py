"""generation_config.json, as transformers finds and reads it: honoured, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig as Theirs

from lvlm.core.errors import BundleError, CheckpointError
from lvlm.runtime.options.generation_config import GenerationConfig

HONOURED = (
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length"),
    *("min_new_tokens", "suppress_tokens", "begin_suppress_tokens", "top_k", "top_p"),
)
# Kept for whoever asks: without effect on greedy answers
SAMPLING = (
    "do_sample",
    "temperature",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "max_new_tokens",
)
# What changes an answer and is not done here, with the values that change nothing, besides None
REFUSED: Mapping[str, tuple[object, ...]] = {
    "constraints": (),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "stop_strings": (),
    "token_healing": (False,),
    "watermarking_config": (),
}


def read_generation_config(folder: Path) -> Theirs:
    """transformers' own, of a model that was loaded from ``folder``: without the file it comes from
    config.json. Raises ValueError, OSError and whatever else transformers does."""
    if (folder / "generation_config.json").is_file():
        return Theirs.from_pretrained(folder)
    if (folder / "config.json").is_file():
        return Theirs.from_pretrained(folder, "config.json", _from_model_config=True)
    return Theirs()


def honoured(config: Theirs, folder: Path) -> dict[str, Any]:
    """The manifest's ``generation``. CheckpointError names what a bundle cannot do."""
    for name, idle in REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value not in idle:
            raise CheckpointError(
                f"{folder}/generation_config.json has {name} = {str(value)[:60]}, which a bundle "
                "does not do: its answers would not be those of transformers' generate; remove it "
                "from that file if you can do without"
            )
    if config.cache_implementation == "quantized":
        raise CheckpointError(
            f"{folder}/generation_config.json asks for a quantized cache; remove "
            "cache_implementation from it, and give --cache fp16 for a smaller one"
        )
    found = {name: getattr(config, name) for name in HONOURED}
    if found["min_new_tokens"] is not None:
        found["min_length"] = None  # generate does not look at it then
    values = {name: value for name, value in found.items() if value is not None}
    drawing = {name: getattr(config, name, None) for name in SAMPLING}
    if config.top_k == 0:  # a file that does not say it has generate's own
        drawing["top_k"] = 0
    values["sampling"] = {name: value for name, value in drawing.items() if value is not None}
    try:
        return GenerationConfig.of(values).stored()
    except BundleError as error:
        reason = str(error).removesuffix("; export the bundle again")
        raise CheckpointError(f"{folder}/generation_config.json: {reason}") from None
