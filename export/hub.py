"""Fetching a checkpoint from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from lvlm.runtime.errors import CheckpointError

FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def download(hub_id: str, revision: str | None) -> Path:
    """The folder of a repository in the hub's local cache. Raises CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=FILES))
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached and the model is not in the local cache"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    raise CheckpointError(
        f"{hub_id} could not be downloaded: {reason}; give a local folder with -m"
    )
