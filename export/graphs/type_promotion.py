"""Type promotion that torch.onnx runs before it translates a program, without running the program.

It inserts the casts that torch's operators do by themselves, and for the types of a node's
arguments it runs the whole program once more over fake tensors. Every node knows its value since
it was traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.onnx._internal.fx.passes import type_promotion
from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter as Promotion

from lvlm.export.graphs.exchanged import exchanged


@contextlib.contextmanager
def of_known_values() -> Iterator[None]:
    """Within: torch.onnx promotes types by the values that nodes have; only those that it inserts
    or changes are run."""

    def run_node(self: Promotion, n: torch.fx.Node) -> Any:
        with self._set_current_node(n):
            if rule := type_promotion.get_type_promotion_rule(n, self.type_promotion_table):
                self._maybe_promote_node(n, rule)
        return n.meta["val"] if "val" in n.meta else torch.fx.Interpreter.run_node(self, n)

    with exchanged(Promotion, run_node=run_node):
        yield
