"""Entries of a KV cache as they are stored: numbers in fp32, fp16 or bf16, or in 8 bits.

An entry of 8 bits is a key or value of one head in whole numbers, and behind them its scale, one
byte: the step of these numbers is 2 ^ (scale / 8). So an entry stays one run of one type, which
every graph and every copy moves as it moves others.
"""

from __future__ import annotations

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
SCALE = 1  # numbers behind those of an int8 entry


def entry_width(head_dim: int, dtype: str) -> int:
    """Numbers of an entry of a head of ``head_dim``, stored as ``dtype``."""
    return head_dim + (SCALE if dtype == "int8" else 0)


def side_dtype(dtype: str) -> str:
    """The type of what lies beside entries of ``dtype`` and has their precision: rings of queries,
    states. Beside those of 8 bits it is fp16: states go on from step to step, and a ring is
    small."""
    return "float16" if dtype == "int8" else dtype
