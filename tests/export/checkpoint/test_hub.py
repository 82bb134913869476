"""Checkpoints from a hub: what is downloaded when, and what is shown of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from fake_hub import COMMIT, serve
from forked import run_forked
from safetensors.torch import load_file, save_file

NAME = "owner/tiny"
# Dry run, the plan of an export, and the same from the cache alone
CODE = """
import json, sys
from pathlib import Path
from huggingface_hub import constants, hf_api
from lvlm.export.export_cli import main
from lvlm.export.export_options import ExportOptions
from lvlm.export.export_plan import make_plan
from lvlm.export.recipes.none import NoCompression

name, address, cache = sys.argv[1:]
# What variables of the environment say when the library is imported
hf_api.api.endpoint = constants.ENDPOINT = address
constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
constants.HF_HUB_OFFLINE, constants.HF_HOME, constants.HF_HUB_CACHE = False, cache, cache
assert main(["-m", name, "-o", "out", "--dry-run"]) == 0
print(json.dumps(len(list(Path(cache).rglob("*.safetensors")))))
for quiet in (False, True):
    plan = make_plan(ExportOptions(name, NoCompression(), Path("out")), quiet=quiet)
    found = plan.checkpoint
    print(json.dumps([str(found.folder), plan.weight_bytes, found.absent_bytes]))
assert main(["-m", str(found.folder), "-o", "out", "--dry-run", "-q"]) == 0  # all links
for given in (["owner/nothing"], ["owner/gated"], [name, "--revision", "gone"]):
    assert main(["-m", *given, "-o", "out", "--dry-run"]) == 2
constants.HF_HUB_OFFLINE = True
assert main(["-m", name, "-o", "out", "--dry-run", "-q"]) == 0
adapted = make_plan(ExportOptions("adapter", NoCompression(), Path("out"))).checkpoint
print(adapted.source, adapted.words)
for given in (["owner/other"], [name, "--revision", "v9"]):
    assert main(["-m", *given, "-o", "out", "--dry-run"]) == 2
"""


def test_a_dry_run_reads_headers_only_and_a_download_shows_its_size(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of weights in two files of 300 kB."""
    folder, cache = tmp_path / "repository", tmp_path / "cache"
    folder.mkdir()
    source = checkpoint("llava:llama-gqa-clip")
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: weights[k] for k in keys}, folder / file)
    listed = {"metadata": {}, "weight_map": {k: f for f, keys in parts.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed))
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    total = sum((folder / file).stat().st_size for file in parts)

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 1, "base_model_name_or_path": NAME}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    halves = {"lora_A": torch.ones(1, 64), "lora_B": torch.ones(128, 1)}
    named = {f"{layer}.{part}.weight": tensor for part, tensor in halves.items()}
    save_file(named, adapter / "adapter_model.safetensors")

    with serve(folder, NAME) as (address, asked):
        done = run_forked(CODE, NAME, address, str(cache), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.isdigit())
    table, files, first, second = lines[:at], *lines[at : at + 3]
    assert files == "0"
    [row] = [line for line in table if "download" in line]
    assert f"{total / 1e6:.1f} MB" in row
    assert f"{NAME} LoRA of rank 1 from adapter (1 weights); safetensors, 2 files" in lines
    made, again = json.loads(first), json.loads(second)
    assert made == again
    assert Path(made[0]).name == COMMIT
    assert made[2] == 0
    shown = [line for line in done.stderr.splitlines() if "download owner/tiny" in line]
    assert len(shown) == 1
    assert f"{total / 1e6:.1f} MB, files: 2" in shown[0]
    told = [line.removeprefix("lvlm-export: error: ") for line in done.stderr.splitlines()[-5:]]
    for line, wanted in zip(
        told,
        (
            "owner/nothing could not be downloaded: the hub has no model of that name",
            f"owner/gated is gated: accept its terms at {address}/owner/gated, then give a token",
            "owner/tiny has no revision gone; its page lists",
            "owner/other is not in the local cache, and offline mode is on (HF_HUB_OFFLINE)",
            "owner/tiny at revision v9 is not in the local cache, and offline mode is on",
        ),
        strict=True,
    ):
        assert line.startswith(wanted), line
    assert not [path for _, path, sent in asked if sent and path.endswith(".bin")]
    sent = [(path, sent) for how, path, sent in asked if path.endswith(".safetensors") and sent]
    assert len(sent) == 4  # two headers, two files
