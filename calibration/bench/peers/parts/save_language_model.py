"""Save the language model of a checkpoint alone, in fp32: ``… CHECKPOINT OUT``.

Runtimes that know no images take it. Its context is made long enough for images and long
answers: their tables of positions end there.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

CONTEXT = 16_384  # tokens


def main(checkpoint: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    whole = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    config = whole.config.get_text_config()
    config.max_position_embeddings = max(CONTEXT, config.max_position_embeddings)
    text = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    text.get_decoder().load_state_dict(whole.get_decoder().state_dict())
    text.get_output_embeddings().weight = whole.get_output_embeddings().weight
    text.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
