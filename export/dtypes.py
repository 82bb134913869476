"""Data types as the command line names them; known before torch is loaded."""

DTYPES = ("fp32", "fp16", "bf16")
