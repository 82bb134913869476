"""Layers of a vision tower that give an image's features."""

from __future__ import annotations

from typing import Any

from lvlm.core.errors import CheckpointError


def feature_layers(config: Any) -> list[int]:
    """The layers of ``vision_feature_layer``, 0 being what enters the first.

    Raises:
        CheckpointError: one of them is not there.
    """
    layers, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    wanted = [layers] if isinstance(layers, int) else list(layers)
    for layer in wanted:
        if not -depth - 1 <= layer <= depth:
            raise CheckpointError(
                f"vision_feature_layer {layer} is not there: the vision tower has {depth} layers"
            )
    return [layer % (depth + 1) for layer in wanted]
