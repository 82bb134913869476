"""LoRA adapters: merged weights against plain loops, and against PEFT where it is installed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import plan
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from lvlm.core.errors import CheckpointError, LvlmError, ParameterError
from lvlm.export.checkpoint import checkpoint as checkpoints

BASE = "llava:llama-gqa-clip"
# Layers by the names that they have in transformers' model now, and as older versions had them
Q = "model.language_model.layers.1.self_attn.q_proj"
DOWN = "model.language_model.layers.0.mlp.down_proj"
TOWER = "model.vision_tower.encoder.layers.0.mlp.fc1"
OLDER = "language_model.model.layers.2.self_attn.v_proj"
PROJECTOR = "model.multi_modal_projector.linear_1"
EMBEDDING = "model.language_model.embed_tokens"
PATCHES = "model.vision_tower.embeddings.patch_embedding"
STORED = {
    Q: "language_model.model.layers.1.self_attn.q_proj",
    DOWN: "language_model.model.layers.0.mlp.down_proj",
    TOWER: "vision_tower.encoder.layers.0.mlp.fc1",
    OLDER: OLDER,
    PROJECTOR: "multi_modal_projector.linear_1",
    EMBEDDING: "language_model.model.embed_tokens",
    PATCHES: "vision_tower.embeddings.patch_embedding",
}


@pytest.fixture
def base(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint(BASE)


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(given))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def halves(weights: dict[str, torch.Tensor], module: str, rank: int) -> dict[str, torch.Tensor]:
    """Random A and B of a layer, as large as its weight asks for."""
    shape = weights[f"{STORED[module]}.weight"].shape
    seed = torch.Generator().manual_seed(len(module) + rank)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, *shape[1:], generator=seed),
        f"{module}.lora_B.weight": torch.randn(
            shape[0], rank, *(1 for _ in shape[2:]), generator=seed
        ),
    }


def product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """B @ A, one term after the other."""
    flat = [torch.outer(up.flatten(1)[:, i], down.flatten(1)[i]) for i in range(len(down))]
    return torch.stack(flat).sum(0).view(up.shape[0], *down.shape[1:])


def check(base: Path, adapter: Path, wanted: dict[str, torch.Tensor]) -> None:
    """Everything but ``wanted``, by layer, is the base model's."""
    made = plan(base, lora=adapter)
    weights = load_file(base / "model.safetensors")
    wanted = {f"{STORED[module]}.weight": weight for module, weight in wanted.items()}
    assert set(made.checkpoint.tensors) == set(weights)
    for name, weight in weights.items():
        expected = wanted.get(name, weight)
        torch.testing.assert_close(made.checkpoint.read(name), expected, rtol=1e-5, atol=1e-6)
    changed = [name for name in wanted if not torch.allclose(wanted[name], weights[name])]
    assert len(changed) == len(wanted)


@pytest.mark.parametrize("root", [False, True])
def test_ranks_and_alphas_of_patterns(root: bool, base: Path, tmp_path: Path) -> None:
    """In the language model and in the vision tower, under newer and older names."""
    weights = load_file(base / "model.safetensors")
    ranks = {Q: 2, DOWN: 3, TOWER: 4, OLDER: 2, PATCHES: 2}
    alphas = {Q: 6, DOWN: 6, TOWER: 1.5, OLDER: 10, PATCHES: 6}
    tensors: dict[str, torch.Tensor] = {}
    wanted: dict[str, torch.Tensor] = {}
    for module, rank in ranks.items():
        made = halves(weights, module, rank)
        tensors |= made
        down, up = made.values()
        scaling = alphas[module] / (math.sqrt(rank) if root else rank)
        weight = weights[f"{STORED[module]}.weight"]
        wanted[module] = weight + scaling * product(up, down)
    adapter = write(
        tmp_path / "adapter",
        tensors,
        use_rslora=root,
        rank_pattern={"down_proj": 3, r"vision_tower\.encoder\.layers\.\d+\.mlp\.fc1": 4},
        alpha_pattern={"fc1": 1.5, r"language_model\.model\.layers\.2\.self_attn\.v_proj": 10},
    )
    check(base, adapter, wanted)


def test_dora(base: Path, tmp_path: Path) -> None:
    """Rows of the sum are as long as the adapter says."""
    weights = load_file(base / "model.safetensors")
    made = halves(weights, Q, 2)
    weight = weights[f"{STORED[Q]}.weight"]
    lengths = torch.rand(len(weight)) + 0.5
    merged = weight + 3 * product(made[f"{Q}.lora_B.weight"], made[f"{Q}.lora_A.weight"])
    rows = [row / math.sqrt(float((row * row).sum())) for row in merged]
    wanted = torch.stack([row * length for row, length in zip(rows, lengths, strict=True)])
    tensors = made | {f"{Q}.lora_magnitude_vector": lengths}
    check(base, write(tmp_path / "adapter", tensors, use_dora=True), {Q: wanted})
    with pytest.raises(CheckpointError, match=r"but .* says no use_dora"):
        plan(base, lora=write(tmp_path / "other", tensors))


def test_embeddings_and_whole_modules(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    rows, width = weights[f"{STORED[EMBEDDING]}.weight"].shape
    down, up = torch.randn(2, rows), torch.randn(width, 2)
    whole = torch.randn(weights[f"{STORED[PROJECTOR]}.weight"].shape)
    tensors = {
        f"{EMBEDDING}.lora_embedding_A": down,
        f"{EMBEDDING}.lora_embedding_B": up,
        f"{PROJECTOR}.weight": whole,
    }
    adapter = write(tmp_path / "adapter", tensors, modules_to_save=["multi_modal_projector"])
    embedded = weights[f"{STORED[EMBEDDING]}.weight"] + 3 * product(up, down).t()
    check(base, adapter, {EMBEDDING: embedded, PROJECTOR: whole})


@pytest.mark.parametrize(
    ("config", "rename", "message"),
    [
        ({"peft_type": "IA3"}, {}, r"of type IA3, not LORA; merge it with peft"),
        ({"init_lora_weights": "pissa"}, {}, r"'pissa' changes the base weights"),
        ({"layer_replication": [[0, 2]]}, {}, r"layer_replication is not supported"),
        ({"trainable_token_indices": [3]}, {}, r"trainable_token_indices is not supported"),
        ({"lora_bias": True}, {}, r"lora_bias is not supported"),
        ({"r": 4}, {}, r"q_proj has rank 2, adapter_config\.json says 4"),
        ({"alpha_pattern": {"(": 1}}, {}, r"alpha_pattern has '\(', no pattern"),
        ({"lora_alpha": "big"}, {}, r"alpha is big, no number"),
        ({}, {Q: "model.language_model.layers.9.self_attn.q_proj"}, r"which .* lacks; is that"),
        ({}, {Q: DOWN}, r"has shape \[2, 64\], the base model asks for \[2, 112\]"),
        ({}, {"lora_A.weight": "lora_C.weight"}, r"lora_C\.weight is not supported"),
        ({}, {"lora_A": "lora_X.lora_A", "q_proj": "q_proj"}, r"one half of .* only"),
    ],
)
def test_what_is_not_supported_is_named(
    config: dict[str, Any], rename: dict[str, str], message: str, base: Path, tmp_path: Path
) -> None:
    tensors = halves(load_file(base / "model.safetensors"), Q, 2)
    for old, new in rename.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    with pytest.raises(LvlmError, match=message) as caught:
        plan(base, lora=write(tmp_path / "adapter", tensors, **config))
    assert "\n" not in str(caught.value)


def test_a_tied_weight_is_named(folder: Path, tmp_path: Path) -> None:
    head = load_file(folder / "model.safetensors")["language_model.model.embed_tokens.weight"]
    adapter = write(tmp_path / "adapter", {"lm_head.weight": head * 2})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight, which is tied to .*embed_tokens"):
        plan(folder, lora=adapter)


def test_an_adapter_finds_its_base(base: Path, tmp_path: Path) -> None:
    """Alone in its folder, by the name that it has of it."""
    tensors = halves(load_file(base / "model.safetensors"), Q, 2)
    shutil.copytree(base, tmp_path / "named/model")
    for name in (str(base), "../named/model"):
        adapter = write(tmp_path / "adapter", tensors, base_model_name_or_path=name)
        made = plan(adapter)
        assert made.checkpoint.adapter == adapter
        assert "LoRA of rank 2 from adapter (1 weights)" in made.checkpoint.forms[0].words
        with pytest.raises(ParameterError, match=r"--lora .* is an adapter, too"):
            plan(adapter, lora=adapter)
        shutil.rmtree(adapter)
    for name, message in (
        (
            "./nowhere",
            r"its base model is not found \(\./nowhere is no folder; .*give that with -m",
        ),
        (None, r"does not name its base model; give that with -m and --lora"),
    ):
        adapter = write(tmp_path / "adapter", tensors, base_model_name_or_path=name)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.resolve(str(adapter))
        shutil.rmtree(adapter)
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        plan(base, lora=tmp_path / "named")


def test_quantized_weights_are_merged_when_dequantized(tmp_path: Path) -> None:
    from packing import as_awq, quantize_folder, round_weight
    from settings import ASSETS

    def awq(name: str, weight: Any) -> Any:
        rounded = round_weight(weight, 4, 64, symmetric=False)
        return as_awq(name, rounded), rounded.dense()

    given = {"quant_method": "awq", "bits": 4}
    packed = quantize_folder(ASSETS / "digits-llava", tmp_path / "packed", given, awq)
    module = "language_model.model.layers.0.self_attn.q_proj"
    dense = load_file(tmp_path / "packed-dense/model.safetensors")[f"{module}.weight"]
    down, up = torch.randn(2, dense.shape[1]), torch.randn(dense.shape[0], 2)
    tensors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    adapter = write(tmp_path / "adapter", tensors)
    with pytest.raises(CheckpointError, match=r"q_proj.*, which is quantized; give --dequantize"):
        plan(packed, lora=adapter)
    made = plan(packed, lora=adapter, dequantize=True).checkpoint.read(f"{module}.weight")
    torch.testing.assert_close(made, dense + 3 * product(up, down))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_peft_s_merged_model(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """The same adapter saved, loaded and merged by PEFT."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj", "fc1"],
        modules_to_save=["linear_2"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 16},
        **options,
    )
    model = peft.get_peft_model(theirs, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.uniform_(parameter, 0.2 if "magnitude" in name else -0.2, 0.4)
    model.save_pretrained(tmp_path / "adapter")
    merged = dict(model.merge_and_unload().named_parameters())
    made = plan(base, lora=tmp_path / "adapter")
    changed = 0
    for name, stored in made.stored_names.items():
        torch.testing.assert_close(made.checkpoint.read(stored), merged[name].data)
        changed += stored in made.checkpoint.made
    assert changed > 20
