"""Export a checkpoint of a 7 or 8B model's exact shapes (random weights); print time and memory.

    python scripts/bench_big_checkpoint.py --work /some/disk/with/36GB --shape llava-1.5-7b

The checkpoint is made once (14 to 18 GB) and kept in --work, unless --remove; the bundle is not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import torch
from big_shapes import SHAPES
from safetensors.torch import save_file

from lvlm.export.checkpoint.checkpoint import find_family

SHARD = 1_000_000_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llava-1.5-7b")
    parser.add_argument("--recipe", default="lightvlm")
    parser.add_argument("--only-make", action="store_true", help="the checkpoint, no export")
    parser.add_argument("--remove", action="store_true", help="the checkpoint too, when done")
    args = parser.parse_args()
    folder = args.work / f"{args.shape}-random"
    if args.only_make:
        make_checkpoint(folder, args.shape)
        return
    if not (folder / "model.safetensors.index.json").exists():
        # In a process of its own: a child's peak counts the memory of whom it is forked from
        make = ["--work", str(args.work), "--shape", args.shape, "--only-make"]
        subprocess.run([sys.executable, __file__, *make], check=True)
    stored = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    output = args.work / f"{args.shape}-bundle"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "lvlm", "export", "-m", str(folder), "-r", args.recipe]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "-o", str(output), "--no-validate"])
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"the export failed ({os.waitstatus_to_exitcode(status)})")
    seconds, peak = time.perf_counter() - began, used.ru_maxrss * 1024
    print(f"checkpoint            {stored / 1e9:.2f} GB")
    print(f"bundle                {sum(f.stat().st_size for f in output.iterdir()) / 1e9:.2f} GB")
    print(f"time                  {seconds:.0f} s")
    print(f"peak resident memory  {peak / 1e9:.2f} GB")
    print(f"peak / checkpoint     {peak / stored:.3f}")
    shutil.rmtree(output)
    if args.remove:
        shutil.rmtree(folder)


def make_checkpoint(folder: Path, shape: str) -> None:
    """Shards of about 1 GB, a tokenizer and processors as small tests have them."""
    print(f"making a random checkpoint in {folder} …", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    make, dtype = SHAPES[shape]
    config = make()
    family = find_family(config.to_dict(), "")
    with torch.device("meta"):
        model = family.build(config)
    noise = torch.empty(700_000_000, dtype=dtype).normal_(0, 0.02)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for start, (name, parameter) in enumerate(model.named_parameters()):
        count, begin = parameter.numel(), start * 1009
        weight = noise[begin : begin + count].reshape(parameter.shape).clone()
        if parameter.ndim == 1 and name.endswith("weight"):
            weight += 1  # norms: near 0 they would leave every token equally important
        shard[name] = weight
        if sum(t.nbytes for t in shard.values()) > SHARD:
            flush()
    flush()
    shipped = Path(str(resources.files("lvlm.assets") / "tiny-llava"))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(shipped / file, folder)
    for file, content in family.tiny_files(config).items():
        (folder / file).write_text(content)
    config.dtype = dtype
    config.save_pretrained(folder)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
