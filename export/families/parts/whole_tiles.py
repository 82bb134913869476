"""Images of whole tiles, each of which gives as many tokens as the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from lvlm.export.families.family import too_few_tokens
from lvlm.runtime.bundle.manifest import Images

Config = Mapping[str, object]  # of a processor


def tile_images(
    token: str,
    token_id: int,
    size: tuple[int, int],
    processor: Config,
    max_tokens: Callable[[Config], int],
) -> Images:
    """Images of tiles of ``size`` pixels, with ``tile_tokens`` each by the processor's config;
    ``max_tokens`` gives what an image has at most."""
    tokens = max_tokens(processor)
    return Images(
        token=token,
        token_id=token_id,
        tokens=tokens,
        grid=(),
        size=size,
        processor=dict(processor),
        max_dims={"units": _tiles(tokens, processor)},
    )


def fewer_tiles(
    images: Images,
    tokens: int,
    bounded: Callable[[Config, int], dict[str, object] | None],
    max_tokens: Callable[[Config], int],
) -> Images:
    """The same with so many tiles that an image gives at most ``tokens``; ParameterError if one
    tile gives more."""
    processor = bounded(images.processor, tokens)
    if processor is None:
        raise too_few_tokens(tokens, images.processor["tile_tokens"])
    highest = max_tokens(processor)
    return replace(
        images, tokens=highest, processor=processor, max_dims={"units": _tiles(highest, processor)}
    )


def _tiles(tokens: int, processor: Config) -> int:
    each = processor["tile_tokens"]
    assert isinstance(each, int)
    return tokens // each
