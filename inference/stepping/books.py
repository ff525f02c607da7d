"""What every ``Pruner`` does alike: the books of the sequences that are watched, and a prune."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.inference.backend import CellAttention
from pyagent_node.inference.stepping.attention import AttentionBook
from pyagent_node.inference.stepping.sequences import SequenceLog


class BookKeeper(ABC):
    """Keeps an :class:`AttentionBook` of ``n_layers`` layers for each watched sequence.

    ``books`` are by sequence, shared with whoever measures.
    """

    def __init__(self, n_layers: int, books: dict[int, AttentionBook] | None = None) -> None:
        self.books: dict[int, AttentionBook] = {} if books is None else books
        self._n_layers = n_layers

    @abstractmethod
    def keep(self, log: SequenceLog, kept: NDArray[np.intp]) -> None:
        """Keep the cells at these indices only, in the log, too.

        Where that fails the sequence is as it was, or empty, and so is its log.
        """

    def watch(self, log: SequenceLog, every: int, window: int) -> None:
        """Begin to measure, or begin anew."""
        self.books[log.seq] = AttentionBook(log, self._n_layers, every=every, window=window)

    def forget(self, seq: int) -> None:
        """Stop measuring, if it does."""
        self.books.pop(seq, None)

    def attention(self, log: SequenceLog) -> CellAttention:
        """Return what was measured; raises :class:`InvalidRequest` (``not_watched``)."""
        book = self.books.get(log.seq)
        if book is None:
            raise InvalidRequest(
                f"Sequence {log.seq} is not watched.",
                code="not_watched",
                remedy="Watch it before the steps that are to be measured.",
                seq=log.seq,
            )
        return book.result()

    def trimmed(self, log: SequenceLog) -> None:
        """Forget what was measured of cells that are gone."""
        book = self.books.get(log.seq)
        if book is not None:
            book.trimmed()

    def prune(self, log: SequenceLog, kept: NDArray[np.intp]) -> None:
        """Keep some cells, and what was measured of them."""
        if len(kept) == log.count:
            return
        try:
            self.keep(log, kept)
        except BaseException:
            self.trimmed(log)
            raise
        book = self.books.get(log.seq)
        if book is not None:
            book.pruned(kept)
