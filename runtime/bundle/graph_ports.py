"""Ports that a bundle's graphs must have, by the rest of its manifest.

The runtime feeds and reads them by this; a graph that differs, or a manifest, is refused before
anything is loaded. What the graphs themselves say is compared when they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from lvlm.core.errors import BundleError, shown
from lvlm.runtime.bundle.entry_form import entry_width, side_dtype
from lvlm.runtime.bundle.manifest import Manifest, Port

# Bits of a number, by the types that ports and weights may have
BITS = {
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "int64": 64,
    "int32": 32,
    "bool": 8,
    "uint8": 8,
    "int8": 8,
    "uint4": 4,
    "int4": 4,
}
Form = tuple[str, tuple[int | None, ...]]  # type, and sizes of dimensions, None: any
Forms = dict[str, Form]
ROW: tuple[None, None] = (None, None)  # [batch, tokens]


def check_ports(manifest: Manifest, path: Path) -> None:
    """Raise BundleError for a port that is missing, of no use, or of another form."""
    for name, graph in manifest.graphs.items():
        takes, may_take, gives = FORMS[name](manifest)
        _compare(f"{path}: graph {name}, inputs", graph.inputs, takes, may_take, name == "vision")
        _compare(f"{path}: graph {name}, outputs", graph.outputs, gives, {}, False)


def _compare(
    where: str, ports: Iterable[Port], wanted: Forms, optional: Mapping[str, Form], more: bool
) -> None:
    """``more``: others may be there, too."""
    found: dict[str, Port] = {}
    for port in ports:
        form = wanted.get(port.name) or optional.get(port.name)
        if port.name in found:
            what = f"{shown(port.name)} is listed twice"
        elif port.dtype not in BITS:
            what = f"{shown(port.name)} is of the unknown type {shown(port.dtype)}"
        elif form is None and not more:
            what = f"{shown(port.name)} has no use"
        elif form is not None and not _fits(port, form):
            what = f"{shown(port.name)} is {_written(port.dtype, port.dims)}, not {_written(*form)}"
        else:
            found[port.name] = port
            continue
        raise BundleError(f"{where}: {what}; export again")
    if missing := [name for name in wanted if name not in found]:
        raise BundleError(f"{where}: {missing[0]} is missing; export again")


def _fits(port: Port, form: Form) -> bool:
    dtype, dims = form
    same = port.dtype == dtype and len(port.dims) == len(dims)
    return same and all(d in (None, p) for p, d in zip(port.dims, dims, strict=True))


def _written(dtype: str, dims: Iterable[int | str | None]) -> str:
    return f"{dtype} {shown(['any' if d is None else d for d in dims])}".replace("'", "")


def _vision(manifest: Manifest) -> tuple[Forms, Forms, Forms]:
    """Its inputs are the processor's."""
    gives: Forms = {"image_features": (manifest.dtype, (None, manifest.feature_width))}
    if manifest.encoder is not None and manifest.encoder.scores:
        gives["image_scores"] = ("float32", (None, manifest.encoder.scores))
    return {}, {}, gives


def _prefill(manifest: Manifest) -> tuple[Forms, Forms, Forms]:
    takes: Forms = {**_tokens(manifest), "image_id": ("int64", ROW)}
    optional: Forms = {"query_count": ("int64", (None,)), "query_slots": ("int64", (None,))}
    gives: Forms = {"logits": ("float32", (None, manifest.text.vocab))}
    for i in range(len(manifest.reductions)):
        takes |= {f"keep_{i}": ("int64", ROW)}
        takes |= {f"{name}_{i}": ("int64", (None,)) for name in ("keep_slots", "out_slots")}
        optional |= {f"recycle_{i}": ("int64", ROW), f"recycle_slots_{i}": ("int64", (None,))}
        gives |= {f"merge_map_{i}": ("int64", ROW)}
    if manifest.cache_policy is not None:
        takes |= _budget(manifest)
        gives |= {"kept": ("int64", (manifest.text.layers, None))}
    caches = _caches(manifest) | _states(manifest)
    return (
        takes | {f"past_{name}": form for name, form in caches.items()},
        optional,
        gives | {f"present_{name}": form for name, form in caches.items()},
    )


def _decode(manifest: Manifest) -> tuple[Forms, Forms, Forms]:
    per_layer = (manifest.text.layers, None)
    takes: Forms = {
        "input_ids": ("int64", (None, 1)),
        "position_ids": ("int64", (None, 1)),
        "write_index": ("int64", per_layer),
        "valid_length": ("int64", per_layer),
    }
    if _queries(manifest):
        takes["query_index"] = ("int64", (None,))
    caches = _caches(manifest) | _states(manifest)
    return (
        takes | {f"past_{name}": form for name, form in caches.items()},
        {},
        {"logits": ("float32", (None, manifest.text.vocab))}
        | {f"present_{name}": form for name, form in caches.items()},
    )


def _extend(manifest: Manifest) -> tuple[Forms, Forms, Forms]:
    takes: Forms = {**_tokens(manifest), "last_token": ("int64", (None,))}
    if manifest.in_place:
        takes |= dict.fromkeys(("write_index", "past_slots"), ("int64", (None,)))
        takes |= {"image_id": ("int64", ROW)} if manifest.images.bidirectional else {}
    else:
        layers, queries = manifest.text.layers, _queries(manifest)
        takes |= dict.fromkeys(("write_index", "new_until"), ("int64", (layers, None)))
        names = ("past_slots", "past_until", "written")
        takes |= {f"{n}_{layer}": ("int64", (None,)) for layer in range(layers) for n in names}
        if queries:
            takes["ring_slots"] = ("int64", (queries,))
    caches = _caches(manifest) | _states(manifest)
    return (
        takes | {f"past_{name}": form for name, form in caches.items()},
        {},
        {"logits": ("float32", (None, manifest.text.vocab))}
        | {f"present_{name}": form for name, form in caches.items()},
    )


def _compact(manifest: Manifest) -> tuple[Forms, Forms, Forms]:
    layers = manifest.text.layers
    takes: Forms = {"valid_length": ("int64", (layers, None))}
    if queries := _queries(manifest):
        takes["query_slot"] = ("int64", (layers, None, queries))
    caches = _caches(manifest)
    gives: Forms = {"kept": ("int64", (layers, None))}
    return (
        takes | _budget(manifest) | {f"past_{name}": form for name, form in caches.items()},
        {},
        gives | {f"present_{n}": form for n, form in caches.items() if not n.startswith("query")},
    )


FORMS = {
    "vision": _vision,
    "prefill": _prefill,
    "extend": _extend,
    "decode": _decode,
    "compact": _compact,
}


def _tokens(manifest: Manifest) -> Forms:
    """Tokens of a prompt, with the features of its images."""
    grid = manifest.images.positions == "grid"
    return {
        "input_ids": ("int64", ROW),
        "image_features": (manifest.dtype, (None, manifest.feature_width)),
        "image_row": ("int64", ROW),
        "position_ids": ("int64", (3, *ROW) if grid else ROW),
    }


def _budget(manifest: Manifest) -> Forms:
    layers = manifest.text.layers
    slots: Forms = {f"kv_slots_{layer}": ("int64", (None,)) for layer in range(layers)}
    return {"kv_budget": ("int64", (layers, None)), **slots}


def _caches(manifest: Manifest) -> Forms:
    """Keys and values of every layer; its ring of queries, its scores, where it has them."""
    text, queries = manifest.text, _queries(manifest)
    dtype = manifest.cache_dtype
    entry = (dtype, (None, text.kv_heads, None, entry_width(text.head_dim, dtype)))
    ring = (side_dtype(dtype), (None, text.heads, queries, text.head_dim))
    forms: Forms = {}
    for layer in range(text.layers):
        forms |= {f"key_{layer}": entry, f"value_{layer}": entry}
        if queries:
            forms[f"query_{layer}"] = ring
        if manifest.cache_policy is not None and manifest.cache_policy.received:
            forms[f"received_{layer}"] = ("float32", (None, 1, None, 1))
    return forms


def _states(manifest: Manifest) -> Forms:
    """States of the layers that have no cache of entries."""
    return {
        f"state_{number}": (dtype, (None, *sizes))
        for number, (sizes, dtype) in enumerate(manifest.text.state_forms(manifest.cache_dtype))
    }


def _queries(manifest: Manifest) -> int:
    return manifest.cache_policy.queries if manifest.cache_policy is not None else 0
