"""Which cells a prune keeps, and what a backend that can prune brings.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import InvalidRequest, Unsupported
from pyagent_node.inference.backend import CellAttention, KvRange, KvUsage
from pyagent_node.inference.stepping.sequences import SequenceLog


class Pruner(Protocol):
    """Watches the attention of sequences, and gives up cells of theirs."""

    def watch(self, log: SequenceLog, every: int, window: int) -> None:
        """Begin to measure, or begin anew; see ``WatchSequence``, the numbers are checked."""
        ...

    def forget(self, seq: int) -> None:
        """Stop measuring, if it does."""
        ...

    def attention(self, log: SequenceLog) -> CellAttention:
        """Return what was measured; raises :class:`InvalidRequest` (``not_watched``)."""
        ...

    def trimmed(self, log: SequenceLog) -> None:
        """Note that the last cells of a sequence were dropped from its log."""
        ...

    def prune(self, log: SequenceLog, kept: NDArray[np.intp]) -> None:
        """Keep the cells at these indices only, in the log, too, and return the memory."""
        ...

    def usage(self, log: SequenceLog) -> KvUsage:
        """Return what the cells take."""
        ...


def no_pruning() -> Unsupported:
    """Return the error of a backend, or a model, that cannot do any of it."""
    return Unsupported(
        "Attention can be watched, and cells can be pruned, only in models of plain attention whose"
        " cells can be moved, and in sequences whose positions were not shifted.",
        code="no_pruning",
    )


def check_watch(seq: int, every: int, window: int) -> None:
    """Check the numbers of a ``WatchSequence``; raises :class:`InvalidRequest`."""
    for name, value in (("every", every), ("window", window)):
        if not 0 <= value < 2**31:
            raise InvalidRequest(
                f"{name} is {value} for sequence {seq}; it must lie between 0 and 2147483647.",
                code="bad_parameter",
                parameter=name,
            )


def kept_positions(kv: KvRange) -> NDArray[np.int32]:
    """Return the positions for which a range has rows, ascending.

    Raises :class:`InvalidRequest` (``kv_range``) for ``kept`` that are not as ``KvRange`` says.
    """
    if not kv.kept:
        return np.arange(kv.start, kv.stop, dtype=np.int32)
    return _positions(
        kv.kept,
        kv.start,
        kv.stop,
        lambda what: InvalidRequest(f"KV with gaps was refused: {what}.", code="kv_range"),
    )


def _positions(
    ranges: Sequence[tuple[int, int]],
    first: int,
    last: int,
    error: Callable[[str], InvalidRequest],
) -> NDArray[np.int32]:
    """Return the positions in ranges that must lie in order in ``[first, last)`` and end there."""
    before = first
    for start, stop in ranges:
        if not before <= start < stop <= last:
            raise error(f"positions {start} to {stop} are no range from {before} on up to {last}")
        before = stop
    if before != last:
        raise error(f"the last cell, at {last - 1}, must stay")
    return np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in ranges])


def kept_cells(log: SequenceLog, keep: Sequence[tuple[int, int]]) -> NDArray[np.intp]:
    """Return the indices of the cells at the positions ``keep``, ascending.

    Raises :class:`InvalidRequest` (``kv_range``) unless ``keep`` are ranges as ``PruneSequence``
    wants them, and :class:`Unsupported` (``no_pruning``) for a sequence whose positions were
    shifted.
    """

    def bad(what: str) -> InvalidRequest:
        return InvalidRequest(
            f"Sequence {log.seq} was not pruned: {what}.", code="kv_range", seq=log.seq
        )

    if not log.ordered:
        raise Unsupported(
            f"Sequence {log.seq} had positions shifted and cannot be pruned.", code="no_pruning"
        )
    if not keep:
        raise bad("nothing would be left of it; free it instead")
    wanted = _positions(keep, 0, log.end, bad)
    found = np.searchsorted(log.positions, wanted)
    missing = wanted[log.positions[found] != wanted]
    if len(missing):
        raise bad(f"it has no cell at position {missing[0]}")
    return found
