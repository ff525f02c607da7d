"""Made-up rows and cells for the self-test of a slice, see ``selftest``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyagent_node.inference.backend import MAX_DECODE_ROWS
from pyagent_node.inference.llama.context import CELL_STEP, LlamaContext
from pyagent_node.inference.llama.kv_state import CellLayout, Cells, build_state
from pyagent_node.inference.stepping.rows import Rows

PREFIX: Final = 1
"""Cells before the rows over which short sequences are tried."""
LONG_CELLS: Final = CELL_STEP + 40
"""Cells before those over which long ones are."""
MAX_ROWS: Final = 256

Outputs = NDArray[np.float32]


class Probe:
    """Feeds made-up rows to sequence 0 of a context."""

    def __init__(
        self,
        context: LlamaContext,
        clock: Callable[[], float],
        *,
        tapped: bool,
        takes_tokens: bool,
    ) -> None:
        self.context = context
        self.clock = clock
        self._tapped = tapped
        rng = np.random.default_rng(MAX_ROWS)
        self._tokens = rng.integers(0, context.model.n_vocab, MAX_ROWS).astype(np.int32)
        shape = (0 if takes_tokens else MAX_ROWS, context.n_embd)
        self._activations = rng.standard_normal(shape, np.float32)
        self.takes_tokens = takes_tokens
        self.fastest: dict[int, float] = {}
        """Seconds of the fastest call of so many rows."""

    def feed(self, start: int, rows: range, threads: int = 1) -> Outputs:
        """Compute ``rows`` of the made-up input at position ``start`` and after."""
        n = len(rows)
        batch = self._batch(start, rows, wanted=1)
        out = np.empty((n, self.context.n_embd), np.float32) if self._tapped else None
        begun = self.clock()
        self.context.decode(batch, out, lone_threads=threads)
        seconds = self.clock() - begun
        self.fastest[n] = min(seconds, self.fastest.get(n, seconds))
        return out if out is not None else np.stack([self.context.logits(i) for i in range(n)])

    def early(self, start: int, rows: range) -> Outputs:
        """Compute ``rows`` up to the early layer and return what leaves it; nothing is kept."""
        out = np.empty((len(rows), self.context.n_embd), np.float32)
        self.context.decode_early(self._batch(start, rows, wanted=0), out)
        return out

    def last(self, start: int, rows: range) -> Outputs:
        """Compute ``rows`` as a prompt of a slice with the output head: logits of the last one."""
        batch = self._batch(start, rows, wanted=0)
        batch.wanted[-1] = 1
        self.context.decode(batch, None, lone_threads=1)
        return np.array(self.context.logits(len(rows) - 1))

    def _batch(self, start: int, rows: range, *, wanted: int) -> Rows:
        n = len(rows)
        return Rows(
            np.zeros(n, np.int32),
            np.arange(start, start + n, dtype=np.int32),
            self._tokens[rows.start : rows.stop] if self.takes_tokens else None,
            None if self.takes_tokens else self._activations[rows.start : rows.stop],
            np.full(n, wanted, np.int8),
        )

    def singly(self, start: int) -> Outputs:
        """Compute :data:`MAX_DECODE_ROWS` rows one by one, on one thread: the reference."""
        ones = [self.feed(start + i, range(i, i + 1)) for i in range(MAX_DECODE_ROWS)]
        return np.concatenate(ones)

    def same(self, start: int, width: int, reference: Outputs, threads: int = 1) -> bool:
        """Whether so many rows in one call are those of the reference; they are dropped again."""
        out = self.feed(start, range(width), threads)
        self.drop(start)
        return np.array_equal(out, reference[:width])

    def drop(self, start: int) -> None:
        """Remove the cells from ``start`` on."""
        self.context.drop(0, start)


def made_up_cells(layout: CellLayout, *, n_streams: int) -> NDArray[np.uint8]:
    """Return :data:`LONG_CELLS` finite f16 cells for sequence 0, the same in every layer."""
    widest = max(kind.nbytes for kind in (*layout.keys, *layout.values))
    rng = np.random.default_rng(LONG_CELLS)
    numbers = rng.standard_normal((LONG_CELLS, widest // 2), np.float32)
    rows = numbers.astype("<f2").view(np.uint8)
    cells = Cells(
        np.arange(LONG_CELLS, dtype=np.int32),
        tuple(rows[:, : kind.nbytes] for kind in layout.keys),
        tuple(rows[:, : kind.nbytes] for kind in layout.values),
    )
    return build_state(layout, [cells], seq=0, n_streams=n_streams)
