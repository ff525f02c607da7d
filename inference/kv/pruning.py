"""Which cells of a long session are worth their memory: the policy of pruning.  Pure.

Attention rests on few cells (``budgets`` says on how many).  What is kept:

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

from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyagent_node.inference.kv.budgets import SINKS, WINDOW

POOL: Final = 7
"""Neighbours that share the highest mass among them, a cell in the middle of them included."""
Positions = NDArray[np.int32]
Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of positions, sorted, neither empty nor touching."""


def kept(
    positions: Positions,
    mass: NDArray[np.float32],
    seen: NDArray[np.int32],
    *,
    most: int,
    sinks: int = SINKS,
    window: int = WINDOW,
) -> Positions:
    """Return the positions to keep of the cells held, at most ``most`` (or what is always kept).

    Always kept are the first ``sinks`` and the last ``window``.

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
    always[:sinks] = True
    always[max(0, count - window) :] = True
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
