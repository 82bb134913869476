"""Tokens read behind a compressed cache, as decode would read them one after the other."""

from __future__ import annotations

import numpy as np

from lvlm.core.errors import BackendError
from lvlm.runtime.backends import Buffer, Call
from lvlm.runtime.generate.loaded_graphs import TOKENS_AT_ONCE, Graphs, check_kept
from lvlm.runtime.kv.slot_counts import SlotCounts
from lvlm.runtime.prompt.prompts import Prompt


class TokensBehind:
    """Reading behind the entries of one row, whose buffers are ``row`` and whose ``counts`` go on
    with what is read. Where compaction comes at intervals, it comes here, too, as in decode."""

    def __init__(self, graphs: Graphs, row: dict[str, Buffer], counts: SlotCounts) -> None:
        self.graphs, self.counts, self._stopped = graphs, counts, False
        self._extend = graphs.bind("extend", row)
        interval = counts.until_compaction is not None
        self._compact: Call | None = graphs.bind("compact", row) if interval else None

    def read(self, prompt: Prompt, start: int, features: np.ndarray) -> np.ndarray:
        """Logits [1,vocabulary] after the prompt, of which the first ``start`` tokens were read.

        ``features`` [V,D] are those of its last V image tokens, all that follow among them. Raises
        BackendError: a graph failed, or was stopped.
        """
        logits = np.empty((1, 0), np.float32)
        while start < len(prompt.ids):
            if self._stopped:
                raise BackendError("nobody waits for the answer any more; the prompt is left")
            count = self.counts.until_compaction or TOKENS_AT_ONCE
            span = range(start, min(start + min(count, TOKENS_AT_ONCE), len(prompt.ids)))
            logits = self.graphs.extend_kept(prompt, span, features, self.counts, self._extend)
            self._compacted()
            start = span.stop
        return logits

    def stop(self) -> None:
        """Stop, from another thread."""
        self._stopped = True
        self._extend.stop()
        if self._compact is not None:
            self._compact.stop()

    def _compacted(self) -> None:
        """Drop entries if an interval is over."""
        inputs = self.counts.compaction()
        if inputs is None or self._compact is None:
            return
        kept = np.empty_like(inputs["kv_budget"])
        self._compact(inputs, {"kept": kept})
        check_kept(kept, inputs["kv_budget"])
        self.counts.compacted()
