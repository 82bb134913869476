"""Qwen3.5: Qwen3-VL's tower without DeepStack; most layers of the text are linear attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5.configuration_qwen3_5 import (
    Qwen3_5TextConfig,
    Qwen3_5VisionConfig,
)
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5VisionAttention,
    Qwen3_5VisionRotaryEmbedding,
)

from lvlm.core.errors import CheckpointError
from lvlm.export.families.parts.llama_text import one_of, tiny, tiny_token
from lvlm.export.families.parts.qwen3_5_text import TEXT, qwen3_5_states
from lvlm.export.families.parts.qwen3_vl_like import Qwen3Like
from lvlm.export.families.parts.qwen_vl_like import tiny_text
from lvlm.export.graphs.language_model import LayerState
from lvlm.export.leaves import Attention, Rotary, Table

LINEAR, FULL = "linear_attention", "full_attention"
SIZES = (
    *("linear_num_key_heads", "linear_num_value_heads"),
    *("linear_key_head_dim", "linear_value_head_dim"),
)


class Qwen3_5(Qwen3Like):  # noqa: N801 (its name)
    """See Family."""

    name = "qwen3.5"
    aliases: ClassVar[Mapping[str, str]] = {
        "qwen3.5": "Qwen/Qwen3.5-4B",
        "qwen3.5-9b": "Qwen/Qwen3.5-9B",
        "qwen3.5-27b": "Qwen/Qwen3.5-27B",
    }
    model_types = ("qwen3_5",)
    text = TEXT
    tower: ClassVar[Table] = {
        Qwen3_5VisionRotaryEmbedding: Rotary(("axial",)),
        Qwen3_5VisionAttention: Attention(),
    }
    config_class = Qwen3_5Config
    model_class = Qwen3_5ForConditionalGeneration
    default_section = (11, 11, 10)

    def read_config(self, raw: Mapping[str, Any]) -> Any:
        config = super().read_config(raw)
        text = config.text_config
        for kind in text.layer_types:
            one_of(self.name, "layer type", kind, (FULL, LINEAR))
        if FULL not in text.layer_types:
            raise CheckpointError("text_config has no layer that attends; this is no Qwen3.5")
        one_of(self.name, "hidden_act", text.hidden_act, ("silu",))
        for name in SIZES:
            if getattr(text, name) < 1:
                raise CheckpointError(f"text_config.{name} {getattr(text, name)} must be 1 or more")
        if text.linear_num_value_heads % text.linear_num_key_heads:
            raise CheckpointError(
                f"linear_num_value_heads {text.linear_num_value_heads} is no multiple of "
                f"linear_num_key_heads {text.linear_num_key_heads}"
            )
        if not 2 <= text.linear_conv_kernel_dim <= 64:
            raise CheckpointError(
                f"linear_conv_kernel_dim {text.linear_conv_kernel_dim} is not supported; 2 to 64 "
                "are"
            )
        return config

    def states(self, text: Any) -> tuple[LayerState, ...]:
        return qwen3_5_states(text)

    def tiny_configs(self) -> Iterator[tuple[str, Any]]:
        """GQA and MHA, value heads in groups and not, linear attention first and last, side by
        side and not, convolutions of two sizes, a part of a head turned and all of it."""
        vision: dict[str, Any] = {"num_heads": 3, "hidden_size": 48, "out_hidden_size": 64}
        yield (
            "gqa-linear-first",
            tiny(
                Qwen3_5Config,
                Qwen3_5TextConfig(
                    **_rope(tiny_text(layers=5, heads=4, kv_heads=2, section=[2, 1, 1]), 0.25),
                    head_dim=32,
                    layer_types=[LINEAR, LINEAR, FULL, LINEAR, FULL],
                    linear_key_head_dim=16,
                    linear_value_head_dim=24,
                    linear_num_key_heads=2,
                    linear_num_value_heads=4,
                ),
                Qwen3_5VisionConfig(
                    **vision, depth=2, intermediate_size=80, num_position_embeddings=64
                ),
                image_token_id=3,
                video_token_id=tiny_token(0),
            ),
        )
        yield (
            "mha-linear-last-tied",
            tiny(
                Qwen3_5Config,
                Qwen3_5TextConfig(
                    **_rope(tiny_text(layers=4, heads=2, kv_heads=2, section=[4, 2, 2]), 1.0),
                    head_dim=16,
                    layer_types=[FULL, LINEAR, FULL, LINEAR],
                    linear_conv_kernel_dim=3,
                    linear_key_head_dim=32,
                    linear_value_head_dim=16,
                    linear_num_key_heads=3,
                    linear_num_value_heads=3,
                ),
                Qwen3_5VisionConfig(
                    **vision,
                    depth=3,
                    intermediate_size=56,
                    patch_size=10,
                    num_position_embeddings=25,
                ),
                image_token_id=3,
                video_token_id=tiny_token(0),
                tie_word_embeddings=True,
            ),
        )


def _rope(text: dict[str, Any], share: float) -> dict[str, Any]:
    """A text's settings with that share of a head turned."""
    rope = {**text["rope_parameters"], "partial_rotary_factor": share}
    return {**text, "rope_parameters": rope}


FAMILY = Qwen3_5()
