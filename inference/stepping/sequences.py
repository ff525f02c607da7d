"""What the backend remembers of each sequence: its tokens, their positions, how to sample.

llama.cpp keeps the KV cells; this keeps what the cells were made from, in cell order, and says no
before llama.cpp is asked for something that it would not survive or would do silently wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import Conflict, InvalidRequest, LimitExceeded
from pyagent_node.inference.backend import Tokens
from pyagent_node.inference.sampling import SamplingParams


class Bias(NamedTuple):
    """The logit bias of a sequence as arrays."""

    tokens: NDArray[np.int32]
    values: NDArray[np.float32]


class SequenceLog:
    """The cells of one open sequence: ``count`` of at most ``n_ctx``.

    Where cells were given up there may be ``trained`` positions, else no more than cells.
    """

    def __init__(
        self, seq: int, n_ctx: int, sampling: SamplingParams | None, trained: int = 0
    ) -> None:
        self.seq = seq
        self._trained = max(n_ctx, trained)
        self.sampling = sampling
        bias = sampling.logit_bias if sampling is not None else {}
        self.bias = Bias(
            np.fromiter(bias.keys(), np.int32, len(bias)),
            np.fromiter(bias.values(), np.float32, len(bias)),
        )
        self.count = 0
        self.end = 0
        """One past the highest position, 0 when empty: where the next step begins."""
        self.straight = True
        """Whether llama.cpp keeps the cells in the order of their positions, which begin at 0."""
        self.ordered = True
        """Whether it keeps them in that order, whichever positions they are."""
        self._gone_tokens = np.zeros(0, np.int32)
        self._gone_positions = np.zeros(0, np.int32)
        self._pruned = False
        self._tokens = np.zeros(n_ctx, np.int32)
        self._positions = np.zeros(n_ctx, np.int32)

    @property
    def n_ctx(self) -> int:
        """The most cells."""
        return len(self._tokens)

    @property
    def tokens(self) -> Tokens:
        """The tokens so far (a view)."""
        return self._tokens[: self.count]

    @property
    def positions(self) -> NDArray[np.int32]:
        """Their positions (a view)."""
        return self._positions[: self.count]

    @property
    def pruned(self) -> bool:
        """Whether cells were given up: what is computed from them is not exact."""
        return self._pruned

    @property
    def history(self) -> Tokens:
        """The tokens so far, with those whose cells were given up, in any order."""
        if not len(self._gone_tokens):
            return self.tokens
        return np.concatenate([self._gone_tokens, self.tokens])

    def check_room(self, position: int, n: int) -> None:
        """Check that ``n`` cells at ``position`` fit, and that there are such positions.

        Raises :class:`LimitExceeded` (``kv_full``) with facts ``n_ctx`` and ``needed``.
        """
        beyond = self._pruned and position + n <= self._trained
        needed = self.count + n if beyond else max(self.count, position) + n
        if needed > self.n_ctx:
            raise LimitExceeded(
                f"Sequence {self.seq} would hold {needed} tokens; it was given room for"
                f" {self.n_ctx}.",
                code="kv_full",
                remedy="Shorten the prompt, or load the model with a longer context.",
                n_ctx=self.n_ctx,
                needed=needed,
            )

    def append(self, position: int, tokens: Tokens) -> None:
        """Note ``tokens`` at ``position`` and after; room was checked."""
        stop = self.count + len(tokens)
        self.straight = self.straight and position == self.count
        self._tokens[self.count : stop] = tokens
        self._positions[self.count : stop] = np.arange(position, position + len(tokens))
        self.count = stop
        self.end = position + len(tokens)

    def trim(self, start: int) -> None:
        """Forget the cells at positions ``[start, ...)``."""
        keep = self.positions < start
        kept = int(keep.sum())
        self._tokens[:kept] = self.tokens[keep]
        self._positions[:kept] = self.positions[keep]
        self.count = kept
        self.end = int(self.positions.max()) + 1 if kept else 0
        self.straight = self.straight or kept == 0
        self.ordered = self.ordered or kept == 0
        self._pruned = self._pruned and kept > 0
        left = self._gone_positions < (start if kept else 0)
        self._gone_tokens, self._gone_positions = (
            self._gone_tokens[left],
            self._gone_positions[left],
        )

    def check_trim(self, start: int) -> None:
        """Check that a sequence that is trimmed to ``start`` ends there, or before with all cells.

        Raises :class:`Conflict` (``kv_pruned``) where the cell before was given up.
        """
        if 0 < start < self.end and (self._gone_positions == start - 1).any():
            raise _pruned(self.seq, f"cannot go back to position {start}")

    def check_whole(self) -> None:
        """Raise :class:`Conflict` (``kv_pruned``) when cells were given up."""
        if self._pruned:
            raise _pruned(self.seq, "has no cells to give away or to move")

    def prune(self, kept: NDArray[np.intp]) -> None:
        """Forget all cells but those at the indices ``kept``, which ascend, the last among them."""
        gone = np.ones(self.count, np.bool_)
        gone[kept] = False
        if not gone.any():
            return
        self._gone_tokens = np.concatenate([self._gone_tokens, self.tokens[gone]])
        self._gone_positions = np.concatenate([self._gone_positions, self.positions[gone]])
        n = len(kept)
        self._tokens[:n] = self.tokens[kept]
        self._positions[:n] = self.positions[kept]
        self.count = n
        self.straight = False
        self._pruned = True

    def select(self, start: int, stop: int) -> NDArray[np.intp]:
        """Return the indices of the cells at positions ``[start, stop)``, by position.

        Raises :class:`InvalidRequest` (``kv_range``) when the range is empty, or not every position
        of it has a cell.
        """
        if self.straight and 0 <= start < stop <= self.count:
            return np.arange(start, stop)
        positions = self.positions
        inside = np.flatnonzero((positions >= start) & (positions < stop))
        if not 0 <= start < stop or len(inside) != stop - start:
            raise InvalidRequest(
                f"Sequence {self.seq} has {len(inside)} cells at positions {start} to {stop}.",
                code="kv_range",
                seq=self.seq,
            )
        return inside[np.argsort(positions[inside])]

    def shift(self, start: int, stop: int, delta: int) -> None:
        """Add ``delta`` to positions ``[start, stop)``.

        Raises :class:`InvalidRequest` (``kv_range``) when two cells would share a position or one
        would leave ``[0, n_ctx)``; nothing is changed then.
        """
        moved = self.positions.astype(np.int64)
        moved[(moved >= start) & (moved < stop)] += delta
        if len(moved) and (moved.min() < 0 or moved.max() >= self.n_ctx):
            raise InvalidRequest(
                f"Shifting by {delta} would leave positions 0 to {self.n_ctx}.", code="kv_range"
            )
        if len(np.unique(moved)) != len(moved):
            raise InvalidRequest(
                f"Shifting by {delta} would put two tokens at one position.", code="kv_range"
            )
        self.straight = self.ordered = False
        self._positions[: self.count] = moved
        self.end = int(moved.max()) + 1 if len(moved) else 0


def _pruned(seq: int, what: str) -> Conflict:
    return Conflict(
        f"Sequence {seq} was pruned and {what}.",
        code="kv_pruned",
        remedy="Free the sequence and compute its tokens again.",
        seq=seq,
    )
