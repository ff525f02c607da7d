"""Which cells of a long session are worth their memory: the policy of pruning.  Pure.

Attention rests on few cells.  Measured on SmolLM2-135M, the cells that carry 90 % of the attention
of the last tokens of a text are about 100 of 256 and 600 of 8,192: they grow with the square root
of the context, not with the context.  So that is how the automatic budget grows (:func:`budget`).
What is kept:

* the first tokens, on which attention rests whatever they say (sinks; StreamingLLM,
  arXiv:2309.17453);
* the last tokens, all of them: the newest have not been measured, guesses may yet be taken back
  there, and language is local (StreamingLLM; H2O, arXiv:2306.14048);
* of the rest those that got the most attention on the rows that were sampled (H2O), where the rows
  at the end of a prompt, which know what is asked, count like any other (SnapKV,
  arXiv:2404.14469).  What a cell got is the *mean* over the sampled rows that could see it, else
  old cells would win by their age.  Neighbours share the highest mass among them, as in SnapKV: a
  fact is a few tokens in a row, and half of it is no use.

A cell is a token in all layers of a rank, so layers of a rank have the same budget (PyramidKV,
arXiv:2406.02069, gives lower layers more); every rank goes by what its own layers attend to.

What is dropped is gone: a session that was pruned does not say what it would have said.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import InvalidRequest

SINKS: Final = 4
"""First tokens that are always kept, as in StreamingLLM."""
WINDOW: Final = 128
"""Last tokens that are always kept; no more may be taken back at once."""
ROOT: Final = 16
"""Cells in the automatic budget for the square root of the context."""
POOL: Final = 7
"""Neighbours that share the highest mass among them, a cell in the middle of them included."""
SLACK: Final = 64
"""So many cells too many are put up with, or a quarter of the budget where that is more."""
MIN_CELLS: Final = 256
"""The smallest budget that can be asked for."""
MAX_CELLS: Final = 1 << 24
OFF: Final = "off"
AUTO: Final = "auto"

Positions = NDArray[np.int32]
Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of positions, sorted, neither empty nor touching."""


class Pruning(msgspec.Struct, frozen=True, gc=False):
    """How many cells a session may hold on a rank; ``cells`` is 0 for the automatic budget."""

    cells: int = 0

    def __str__(self) -> str:
        """Return what :func:`read_budget` would read."""
        return str(self.cells) if self.cells else AUTO


def read_budget(text: str) -> Pruning | None:
    """Return what ``off``, ``auto`` or a number of cells means; ``None`` for ``off``.

    Raises :class:`InvalidRequest` (``bad_parameter``).
    """
    if text == OFF:
        return None
    if text == AUTO:
        return Pruning()
    if text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_CELLS)):
        pruning = Pruning(int(text) or -1)
        check(pruning)
        return pruning
    raise _bad(f"kv_budget is {text[:40]!r}")


def check(pruning: Pruning) -> None:
    """Raise :class:`InvalidRequest` (``bad_parameter``) for a budget that nobody can keep."""
    if pruning.cells and not MIN_CELLS <= pruning.cells <= MAX_CELLS:
        raise _bad(f"kv_budget is {max(0, pruning.cells)} cells")


def budget(pruning: Pruning, seen: int) -> int:
    """Return how many cells may be held after ``seen`` tokens of context.

    The automatic budget is sinks, window, and :data:`ROOT` times the square root of the context:
    644 cells of 1,024, 1,580 of 8,192.  It never falls as the context grows.
    """
    return pruning.cells or SINKS + WINDOW + ROOT * math.isqrt(max(0, seen))


def due(pruning: Pruning, held: int, seen: int) -> bool:
    """Whether ``held`` cells are so many too many that pruning is worth the trouble.

    To prune moves cells in memory and breaks off work on the session; so it is done for
    :data:`SLACK` cells or a quarter of the budget at once, never for one.
    """
    most = budget(pruning, seen)
    return held > most + max(SLACK, most // 4)


def kept(
    positions: Positions, mass: NDArray[np.float32], seen: NDArray[np.int32], *, most: int
) -> Positions:
    """Return the positions to keep of the cells held, at most ``most`` (or what is always kept).

    ``positions``, shape (n,), are those of the cells in rising order; ``mass`` the attention that
    each got on the sampled rows, summed; ``seen`` how many of these rows could see it.  Cells that
    no row has seen yet are kept before all others, the newest first; of equals the newer stays.
    """
    count = len(positions)
    if count <= most:
        return positions
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(seen > 0, mass.astype(np.float64) / seen, 0.0)
    scores = _shared(np.nan_to_num(mean, nan=0.0, posinf=0.0, neginf=0.0), positions)
    scores[seen == 0] = np.inf
    always = np.zeros(count, bool)
    always[:SINKS] = True
    always[-WINDOW:] = True
    rest = np.flatnonzero(~always)
    room = max(0, most - int(always.sum()))
    order = np.lexsort((rest, scores[rest]))  # the best last, of equals the newer
    always[rest[order[len(rest) - room :]]] = room > 0
    return positions[always]


def _shared(scores: NDArray[np.float64], positions: Positions) -> NDArray[np.float64]:
    """Return the highest score among neighbours, as far as they still are neighbours."""
    found = scores.copy()
    for off in range(1, POOL // 2 + 1):
        near = positions[off:] - positions[:-off] == off
        found[off:] = np.where(near, np.maximum(found[off:], scores[:-off]), found[off:])
        found[:-off] = np.where(near, np.maximum(found[:-off], scores[off:]), found[:-off])
    return found


def ranges(positions: Positions) -> Ranges:
    """Return positions in rising order as ranges."""
    if not len(positions):
        return ()
    breaks = np.flatnonzero(np.diff(positions) != 1)
    starts = positions[np.concatenate([[0], breaks + 1])]
    stops = positions[np.concatenate([breaks, [len(positions) - 1]])] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def _bad(what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{what}.",
        code="bad_parameter",
        parameter="kv_budget",
        remedy=f"Say off, auto, or a number of cells from {MIN_CELLS} to {MAX_CELLS}.",
    )
