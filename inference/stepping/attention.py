"""What was measured of a sequence's attention, cell by cell.  Pure.

Columns lie as the sequence's cells do: new cells come behind the others, trimming takes the last
ones away, pruning closes the gaps.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.inference.backend import MAX_DECODE_ROWS, CellAttention
from pyagent_node.inference.stepping.sequences import SequenceLog

_NEVER: Final = -1


class RowMass(NamedTuple):
    """What measured rows of one call gave: the sums over them, for the first ``n`` cells.

    ``mass`` has shape (layers, n), ``peak`` (n,), ``entropy`` (layers,).  ``limits`` (int32, one a
    row) is how many cells each row could see.
    """

    mass: NDArray[np.float32]
    peak: NDArray[np.float32]
    entropy: NDArray[np.float64]
    limits: NDArray[np.int32]


class AttentionBook:
    """Gathers what the rows of one watched sequence of ``layers`` layers attended to."""

    def __init__(self, log: SequenceLog, layers: int, *, every: int, window: int) -> None:
        self.log = log
        self._every = every
        self._window = window
        self._last = _NEVER
        self._mass = np.zeros((layers, log.n_ctx), np.float32)
        self._peak = np.zeros(log.n_ctx, np.float32)
        self._seen = np.zeros(log.n_ctx, np.int32)
        self._entropy = np.zeros(layers, np.float64)
        self._rows = 0
        self._width = 0

    def picked(self, first: int, n: int) -> range:
        """Return which of ``n`` rows at position ``first`` and after are to be measured.

        A row that decodes is always a token that stays when it is the first of its call; what
        follows may be guesses.  A position is not measured twice.
        """
        if n > MAX_DECODE_ROWS:
            start = max(n - self._window, self._last + 1 - first, 0)
            return range(start, n) if start < n else range(0)
        due = self._last == _NEVER or first - self._last >= self._every
        return range(1 if due and first > self._last else 0)

    def add(self, position: int, rows: RowMass) -> None:
        """Note measured rows, the last of them at ``position``."""
        n = rows.mass.shape[1]
        self._width = max(self._width, n)
        self._mass[:, :n] += rows.mass
        self._peak[:n] += rows.peak
        blind = np.searchsorted(np.sort(rows.limits), np.arange(n), side="right")
        self._seen[:n] += (len(rows.limits) - blind).astype(np.int32)
        self._entropy += rows.entropy
        self._rows += len(rows.limits)
        self._last = position

    def settle(self) -> None:
        """Forget what was measured of cells that are not in the log, before a call is measured.

        A call can be computed, measured and dropped without the log ever knowing.
        """
        self._clear(self.log.count)

    def trimmed(self) -> None:
        """Note that cells were dropped from the log: positions from its end on come again."""
        self._clear(self.log.count)
        self._last = min(self._last, self.log.end - 1)

    def _clear(self, start: int) -> None:
        stale = slice(start, self._width)
        self._mass[:, stale] = 0
        self._peak[stale] = 0
        self._seen[stale] = 0
        self._width = min(self._width, start)

    def pruned(self, kept: NDArray[np.intp]) -> None:
        """Close the gaps between the cells at the indices ``kept``, which ascend."""
        n = len(kept)
        self._mass[:, :n] = self._mass[:, kept]
        for array in (self._peak, self._seen):
            array[:n] = array[kept]
        self._clear(n)

    def result(self) -> CellAttention:
        """Return a copy of all that was gathered."""
        n, rows = self.log.count, self._rows
        return CellAttention(
            self.log.positions.copy(),
            self._mass[:, :n].copy(),
            self._peak[:n].copy(),
            self._seen[:n].copy(),
            (self._entropy / max(1, rows)).astype(np.float32),
            rows,
        )
