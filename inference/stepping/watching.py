"""Measuring attention, and pruning, for backends that hold their cells in order in arrays.

Such a backend computes the weights of the rows that are measured next to its own attention, layer
by layer, and hands them over (:class:`Watch`); nothing that it computes otherwise changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pyagent_node.inference.backend import KvUsage
from pyagent_node.inference.stepping.attention import AttentionBook, RowMass
from pyagent_node.inference.stepping.books import BookKeeper
from pyagent_node.inference.stepping.pruning import no_pruning
from pyagent_node.inference.stepping.rows import Rows
from pyagent_node.inference.stepping.sequences import SequenceLog

MAX_ROWS_AT_ONCE: Final = 32
"""Rows whose weights are in memory together."""


class Watch:
    """Some rows of one sequence of a call, which see its first ``limits`` cells, one by one.

    ``rows`` are their numbers in the call, ``cells`` is the greatest of the limits.
    """

    def __init__(self, book: AttentionBook, rows: range, first: int, n_layers: int) -> None:
        """Measure ``rows`` of a sequence whose rows begin at number ``first`` of the call."""
        self.seq = book.log.seq
        self.rows = slice(first + rows.start, first + rows.stop)
        self.cells = book.log.count + rows.stop
        self.limits = np.arange(self.cells - len(rows) + 1, self.cells + 1, dtype=np.int32)
        self._book = book
        self._position = book.log.end + rows.stop - 1
        self._mass = np.zeros((n_layers, self.cells), np.float32)
        self._peaks = np.zeros((len(rows), self.cells), np.float32)
        self._entropy = np.zeros(n_layers, np.float64)

    @property
    def hidden(self) -> NDArray[np.bool_]:
        """Which cells a row does not see, shape (rows, cells)."""
        found: NDArray[np.bool_] = np.arange(self.cells) >= self.limits[:, None]
        return found

    def add(self, layer: int, weights: NDArray[np.float32]) -> None:
        """Take the weights of one layer, shape (rows, heads, cells): softmax over visible cells."""
        self._mass[layer] = weights.mean(axis=1).sum(axis=0)
        np.maximum(self._peaks, weights.max(axis=1), out=self._peaks)
        logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
        self._entropy[layer] = -np.einsum("rhc,rhc->", weights, logs) / weights.shape[1]

    def end(self) -> None:
        """Note what was measured."""
        if np.isfinite(self._mass).all():
            peak = self._peaks.sum(axis=0)
            self._book.add(self._position, RowMass(self._mass, peak, self._entropy, self.limits))


class Watcher:
    """The sequences of a context of ``n_layers`` layers that are watched."""

    def __init__(self, n_layers: int) -> None:
        self.books: dict[int, AttentionBook] = {}
        self._n_layers = n_layers

    def watches(self, rows: Rows) -> list[Watch]:
        """Return what is to be measured of a call that begins."""
        found: list[Watch] = []
        for seq, book in self.books.items():
            own = np.flatnonzero(rows.seqs == seq)
            if not len(own) or not book.log.ordered:
                continue
            position = int(rows.positions[own[0]])
            picked = book.picked(position, len(own))
            if not picked or position != book.log.end:
                continue  # rows that are computed beside the sequence are none of its own
            book.settle()
            found += [
                Watch(
                    book,
                    range(start, min(picked.stop, start + MAX_ROWS_AT_ONCE)),
                    int(own[0]),
                    self._n_layers,
                )
                for start in range(picked.start, picked.stop, MAX_ROWS_AT_ONCE)
            ]
        return found


class PrunedContext(Protocol):
    """A context whose cells lie as its sequences' logs say."""

    @property
    def watcher(self) -> Watcher:
        """Who is watched; the context asks it at the beginning of every call."""
        ...

    @property
    def n_layers(self) -> int:
        """Layers of the slice."""
        ...

    def keep(self, seq: int, kept: NDArray[np.intp]) -> None:
        """Keep the cells at these indices, which ascend, and no others."""
        ...

    def drop(self, seq: int, start: int) -> None:
        """Remove the cells of ``seq`` at positions ``[start, ...)``."""
        ...


class PlainPruner(BookKeeper):
    """Implements ``stepping.Pruner`` over such a context; ``cell_bytes`` are a cell's, all layers.

    Memory is given back where the context's arrays shrink.
    """

    def __init__(self, context: PrunedContext, cell_bytes: int) -> None:
        super().__init__(context.n_layers, context.watcher.books)
        self._context = context
        self._cell_bytes = cell_bytes

    def watch(self, log: SequenceLog, every: int, window: int) -> None:
        """Begin to measure; raises :class:`Unsupported` where positions were shifted."""
        if not log.ordered:
            raise no_pruning()
        super().watch(log, every, window)

    def keep(self, log: SequenceLog, kept: NDArray[np.intp]) -> None:
        """Keep some cells; when that fails the sequence is emptied."""
        try:
            self._context.keep(log.seq, kept)
        except BaseException:
            self._context.drop(log.seq, 0)
            log.trim(0)
            raise
        log.prune(kept)

    def usage(self, log: SequenceLog) -> KvUsage:
        """Return what the cells of a sequence take; what is resident is not known."""
        return KvUsage(log.count, log.count * self._cell_bytes, None, log.pruned)


def end_all(watches: Sequence[Watch]) -> None:
    """Note what was measured in a call that is over."""
    for watch in watches:
        watch.end()
