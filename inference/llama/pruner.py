"""Watching where a sequence attends in llama.cpp, and giving up cells of it with their memory.

Attention is measured outside the graph: the tensor tap notes the queries of the rows that are
wanted, and when the call is over their weights are computed natively from these and the keys in
the cache's memory (``attention_rows``).  Rows that are not wanted cost a look into a table.

Cells are given up by making llama.cpp hold the others side by side, at the positions they have, and
by giving the pages behind them back to the system.
"""

from __future__ import annotations

import logging
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.inference.backend import KvUsage
from pyagent_node.inference.llama.cache_view import CacheView
from pyagent_node.inference.llama.cells import CellStore
from pyagent_node.inference.llama.context import LlamaContext
from pyagent_node.inference.models.architectures import ModelShape
from pyagent_node.inference.stepping.attention import AttentionBook, RowMass
from pyagent_node.inference.stepping.books import BookKeeper
from pyagent_node.inference.stepping.pruning import no_pruning
from pyagent_node.inference.stepping.rows import Rows
from pyagent_node.inference.stepping.sequences import SequenceLog
from pyagent_node.native import attention_rows

log = logging.getLogger("pyagent_node.llama")

MAX_ROWS_AT_ONCE: Final = 64
"""Rows that are measured together; of each one number a cell is held meanwhile."""


class _Wanted(NamedTuple):
    """The rows of one sequence that are measured: ``rows`` of its own in the call."""

    book: AttentionBook
    rows: range


class LlamaPruner(BookKeeper):
    """Implements ``stepping.Pruner``, for a model of this shape and of plain attention."""

    def __init__(
        self,
        context: LlamaContext,
        cells: CellStore,
        cache: CacheView,
        shape: ModelShape,
        cell_bytes: int,
    ) -> None:
        super().__init__(context.model.n_layers)
        self._context = context
        self._cells = cells
        self._cache = cache
        self._shape = shape
        self._cell_bytes = cell_bytes
        self._wanted: list[_Wanted] = []
        self._queries = np.empty((0, 0, 0), np.float32)

    # ---- stepping.Pruner ---------------------------------------------------------------------

    def watch(self, log: SequenceLog, every: int, window: int) -> None:
        """Begin to measure; raises :class:`Unsupported` where positions were shifted.

        Where a call on the sequence's slot has failed nothing is measured before the next prune.
        """
        if not log.ordered:
            raise no_pruning()
        super().watch(log, every, window)
        self._context.watcher = self

    def forget(self, seq: int) -> None:
        """Stop measuring, if it does."""
        super().forget(seq)
        if not self.books:
            self._context.watcher = None

    def keep(self, log: SequenceLog, kept: NDArray[np.intp]) -> None:
        """Keep some cells; see ``CellStore.prune``."""
        self._cells.prune(log, kept)

    def usage(self, log: SequenceLog) -> KvUsage:
        """Return what the cells of a sequence take."""
        resident = self._cache.resident(log.seq)
        return KvUsage(log.count, log.count * self._cell_bytes, resident, log.pruned)

    # ---- context.RowWatcher ------------------------------------------------------------------

    def begin(self, rows: Rows) -> bool:
        """Have the queries noted of the rows of a call that are due."""
        self._wanted = []
        picked: list[NDArray[np.int32]] = []
        for seq, book in self.books.items():
            own = np.flatnonzero(rows.seqs == seq)
            if not len(own) or not self._cells.in_order(book.log):
                continue
            first = int(rows.positions[own[0]])
            wanted = book.picked(first, len(own))
            if not wanted or first != book.log.end:
                continue  # rows that are computed beside the sequence are none of its own
            book.settle()
            self._wanted.append(_Wanted(book, wanted))
            picked.append(own[wanted.start : wanted.stop].astype(np.int32))
        if not picked:
            return False
        shape, numbers = self._shape, np.concatenate(picked)
        size = (self._context.model.n_layers, len(numbers), shape.n_head * shape.head_dim)
        self._queries = np.empty(size, np.float32)
        self._context.query(self._queries, numbers, len(rows.seqs))
        return True

    def end(self) -> None:
        """Measure what was noted."""
        complete = self._context.queried()
        wanted, self._wanted = self._wanted, []
        queries, self._queries = self._queries, np.empty((0, 0, 0), np.float32)
        if not complete:
            return  # the call has failed, and says so itself
        at = 0
        for book, rows in wanted:
            for start in range(rows.start, rows.stop, MAX_ROWS_AT_ONCE):
                part = range(start, min(rows.stop, start + MAX_ROWS_AT_ONCE))
                self._measure(book, part, queries[:, at : at + len(part)])
                at += len(part)

    def _measure(self, book: AttentionBook, rows: range, queries: NDArray[np.float32]) -> None:
        shape, sequence = self._shape, book.log
        cells = sequence.count + rows.stop
        limits = np.arange(cells - len(rows) + 1, cells + 1, dtype=np.int32)
        mass, peak, entropy = attention_rows(
            self._cache.keys,
            self._cache.first_cell(sequence.seq),
            np.ascontiguousarray(queries).reshape(-1),
            limits,
            heads=shape.n_head,
            kv_heads=shape.n_head_kv,
            width=shape.head_dim,
            scale=shape.head_dim**-0.5,
        )
        if not (np.isfinite(mass).all() and np.isfinite(entropy).all()):
            log.warning("attention of sequence %d is not finite and was left out", sequence.seq)
            return
        found = RowMass(mass.reshape(-1, cells), peak, entropy, limits)
        book.add(sequence.end + rows.stop - 1, found)


def find_pruner(
    context: LlamaContext, cells: CellStore, shape: ModelShape, cell_bytes: int
) -> LlamaPruner | None:
    """Return what watches and prunes the sequences of a context; ``None`` where cells are hidden.

    ``cell_bytes`` are those of one cell in all layers.
    """
    cache = cells.cache
    return None if cache is None else LlamaPruner(context, cells, cache, shape, cell_bytes)
