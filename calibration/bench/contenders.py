"""Contenders of a benchmark: bundles and peers as the command line names them, checked before any
work.

A contender is ``WHAT:SETTING:SETTING``: a bundle's folder (``lightvlm/:keep=0.35:device=openvino``)
or a peer's name (``openvino-genai:f32``).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lvlm.bench.bench_arguments import PEERS
from lvlm.bench.case_figures import RequestRecord
from lvlm.bench.workload import RoundWorkload
from lvlm.core.discovery import discover, nearest
from lvlm.core.errors import BundleError, LvlmError, ParameterError
from lvlm.core.installing import install
from lvlm.core.integrity import Verify
from lvlm.runtime.backends import open_backend
from lvlm.runtime.bundle.manifest import Manifest
from lvlm.runtime.bundle.reader import read_bundle

BUNDLE = "bundle"
BUNDLE_SETTINGS = ("device", "keep", "kv-keep")


class BenchError(LvlmError):
    """A contender cannot be measured, or results cannot be written."""


@dataclass(frozen=True)
class Setup:
    """Everything a child process opens. ``source``: bundle, checkpoint, or what it was converted
    to.

    ``prompts`` is the bundle whose tokenizer and processor make a peer's inputs where it does not
    make its own. ``lone``: one request after another, never more; else ``slots`` at once at most
    (a bundle: as many as fit into ``memory_budget``, where that is given), each of ``text_tokens``
    (prompt and answer) and ``images`` at most.
    """

    kind: str
    source: str
    prompts: str
    threads: int
    lone: bool
    slots: int
    text_tokens: int
    images: int
    settings: dict[str, str] = field(default_factory=dict)
    memory_budget: str | None = None


class Serving(Protocol):
    """A contender that is loaded."""

    def serve(self, work: RoundWorkload) -> list[RequestRecord]:
        """Answers every request, greedily and to its full length."""
        ...

    def facts(self) -> dict[str, Any]:
        """Other facts beside its figures: ``decode_weight_bytes``, for one."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Conversion:
    """Conversion of a checkpoint to a peer's own format: commands, run one after another.

    ``{python}`` is the interpreter that has the peer's ``modules``, ``{here}`` this one,
    ``{checkpoint}`` and ``{out}`` the folders. ``advice`` tells how to install what it needs.
    """

    key: str
    modules: tuple[str, ...]
    advice: str
    commands: tuple[tuple[str, ...], ...]


class Peer(Protocol):
    """Another runtime; a file of lvlm.bench.peers has one as ``PEER``.

    ``modules`` it imports; ``settings``: words that may follow its name; ``note`` goes into tables.
    """

    name: str
    modules: tuple[str, ...]
    settings: tuple[str, ...]
    note: str

    def conversion(self, settings: Sequence[str]) -> Conversion | None: ...

    def open(self, setup: Setup) -> Serving: ...


@dataclass(frozen=True)
class Contender:
    """One row of the tables. ``manifest`` is a bundle's, ``peer`` another runtime's."""

    label: str
    settings: dict[str, str]
    folder: Path | None = None
    manifest: Manifest | None = None
    peer: Peer | None = None

    @property
    def note(self) -> str:
        return self.peer.note if self.peer else ""


def peers() -> dict[str, Peer]:
    return discover(PEERS, "PEER")


def bundle_contender(text: str, common: Mapping[str, str], verify: Verify = "sample") -> Contender:
    """``FOLDER[:SETTING…]``; of ``common`` settings (keep, kv-keep) those that its recipe takes.

    Raises ParameterError, BundleError.
    """
    path, *words = [text] if Path(text).exists() else text.split(":")
    folder = Path(path)
    manifest = read_bundle(folder, verify)
    settings = {}
    for word in words:
        name, sign, value = word.partition("=")
        if name not in BUNDLE_SETTINGS:
            raise nearest("setting of a bundle", name, BUNDLE_SETTINGS)
        if not sign or not value:
            raise ParameterError(f"{text}: write {name}=VALUE")
        settings[name] = value
    takes = {
        "keep": any(r.exponent is not None for r in manifest.shortenings),
        "kv-keep": manifest.cache_policy is not None,
        "device": True,
    }
    settings = {k: v for k, v in common.items() if takes[k]} | settings
    open_backend(settings.get("device", "cpu"))  # is it known, and installed?
    for name in settings:
        if not takes[name]:
            raise ParameterError(f"{text}: recipe {manifest.recipe} takes no {name}; leave it out")
    shown = {k: v for k, v in settings.items() if k != "device" or v != "cpu"}
    label = " ".join([folder.resolve().name, *(f"{k}={v}" for k, v in sorted(shown.items()))])
    return Contender(label, settings, folder, manifest)


def peer_contender(text: str) -> Contender:
    """``NAME[:SETTING…]``. Raises ParameterError; BenchError if it is not installed."""
    name, *words = text.split(":")
    known = peers()
    if name not in known:
        raise nearest("peer", name, known)
    peer = known[name]
    for word in words:
        if word not in peer.settings:
            if not peer.settings:
                raise ParameterError(f"{name} takes no settings; leave ':{word}' out")
            raise nearest(f"setting of {name}", word, peer.settings)
    missing = [module for module in peer.modules if importlib.util.find_spec(module) is None]
    if missing:
        raise BenchError(
            f"--against {name}: {', '.join(missing)} not installed; {install('bench', 'export')}"
        )
    return Contender(text, dict.fromkeys(words, ""), peer=peer)


def find_checkpoint(given: Path | None, contenders: Sequence[Contender]) -> Path:
    """The Hugging Face folder that peers run; by default the shipped model of the first bundle.

    Raises BenchError.
    """
    first = next(c for c in contenders if c.manifest is not None)
    assert first.manifest is not None
    assert first.folder is not None
    source = str(first.manifest.model.get("source", ""))
    if given is None:
        from importlib import resources

        given = Path(str(resources.files("lvlm.assets"))) / source
        if not source or not (given / "config.json").is_file():
            raise BenchError(
                f"--against needs the checkpoint that {first.folder} was exported from "
                f"({source or 'unknown'}); give its folder with --checkpoint"
            )
    if not (given / "config.json").is_file():
        raise BenchError(f"--checkpoint {given}: no config.json in it; give a Hugging Face folder")
    own, theirs = first.folder / "tokenizer.json", given / "tokenizer.json"
    if not theirs.is_file() or _vocabulary(own) != _vocabulary(theirs):
        raise BenchError(
            f"--checkpoint {given} has another tokenizer.json than {first.folder}; give the "
            "checkpoint that the bundle was exported from"
        )
    return given.resolve()


def _vocabulary(tokenizer: Path) -> Any:
    """Tokens and merges; an export may write the file anew, with tokens that other files list."""
    try:
        return json.loads(tokenizer.read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BenchError(f"{tokenizer} cannot be read ({error})") from None


def check_fit(contenders: Sequence[Contender], text_tokens: int, images: int) -> None:
    """Bundles of one model, with room for prompts and answers of ``text_tokens`` and ``images``.

    Raises BundleError, ParameterError.
    """
    bundles = [(c.folder, c.manifest) for c in contenders if c.manifest is not None]
    for folder, manifest in bundles:
        if manifest.text != bundles[0][1].text:
            raise BundleError(
                f"{folder} is not the model that {bundles[0][0]} is; compare bundles of one "
                "checkpoint"
            )
        capacity = manifest.capacity
        if text_tokens > capacity.max_text_len:
            raise ParameterError(
                f"{folder} holds {capacity.max_text_len} text tokens, prompt and answer need "
                f"{text_tokens}; export with --max-text-len {text_tokens}, or ask for less"
            )
        if images > capacity.max_images:
            raise ParameterError(
                f"{folder} takes {capacity.max_images} images, not {images}; export with "
                f"--max-images {images}, or ask for less"
            )
