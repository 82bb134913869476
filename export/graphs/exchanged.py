"""Attributes of torch's exporter exchanged for a while: it has no other way to be told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def exchanged(owner: object, **values: object) -> Iterator[None]:
    """Within: these attributes of a class or module have these values."""
    own = {name: vars(owner)[name] for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(owner, name, value)
