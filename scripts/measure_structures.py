"""Measure what structured output costs a token: processor time of the mask and of following it.

    python scripts/measure_structures.py TOKENIZER.json
    python scripts/measure_structures.py --synthetic 131072 FILE...

The second makes a byte-level tokenizer of so many tokens from text files, of which there must be
some tens of megabytes. Answers are drawn from logits of chance, so that they wander through all
that a structure allows; nothing else is computed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lvlm.runtime.options.structure_kinds import Asked
from lvlm.runtime.prompt.text import Tokenizer
from lvlm.runtime.sampling.sampler import Sampler
from lvlm.runtime.sampling.settings import Sampling
from lvlm.runtime.sampling.structure import Structure
from lvlm.runtime.sampling.structure_compiler import StructureCompiler

TOKENS = 400
END = "</s>"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
STRUCTURES = {
    "schema of three fields": Asked("schema", json.dumps(PERSON)),
    "any JSON object": Asked("schema", '{"type": "object"}'),
    "regex, 2,000 digits": Asked("regex", "[0-9]{2000}"),
    "choice of 1,000": Asked("choice", tuple(f"answer {i * 7919}" for i in range(1000))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--synthetic", type=int, metavar="TOKENS", help="size of a tokenizer made")
    args = parser.parse_args()
    library = synthetic(args.files, args.synthetic) if args.synthetic else None
    text = args.files[0].read_text(encoding="utf-8") if library is None else library.to_str()
    end = tokenizers.Tokenizer.from_str(text).token_to_id(END) or 0
    tokenizer = Tokenizer.of_text(text, [end])
    vocab = tokenizers.Tokenizer.from_str(text).get_vocab_size()
    compiler = StructureCompiler(tokenizer.to_json, vocab, tokenizer.eos_ids)
    print(f"{vocab:,} tokens")
    began = time.process_time()
    compiler.compiled(Asked("regex", "a"), "")
    print(f"first structure, the tokenizer read: {time.process_time() - began:.2f} s")
    free = per_token(None, vocab, end)
    print(f"argmax alone: {free:.3f} ms a token")
    for name, asked in STRUCTURES.items():
        began = time.perf_counter()
        structure = compiler.compiled(asked, "")
        compiled = time.perf_counter() - began
        more = per_token(structure, vocab, end) - free
        print(f"{name}: compiled in {compiled * 1e3:.0f} ms; {more:.3f} ms more a token")


def per_token(structure: Structure | None, vocab: int, end: int) -> float:
    """Milliseconds of the processor per token chosen, answers one after the other."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(32, vocab)).astype(np.float32)
    sampler = Sampler(Sampling(), [], structure=structure)
    took = 0.0
    for number in range(TOKENS):
        began = time.process_time()
        token = sampler.choose(logits[number % len(logits)])
        took += time.process_time() - began
        if sampler.complete or token == end:
            sampler = Sampler(Sampling(), [], structure=structure)
    return took / TOKENS * 1e3


def synthetic(files: list[Path], size: int) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    made.train([str(file) for file in files], trainer)
    return made


if __name__ == "__main__":
    main()
