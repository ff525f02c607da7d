"""A toy runner that gives cells up (see ``backend`` for the toy).

It attends to all cells alike, so the newest are kept.  A cell that is given up is taken out of the
states of its layers; so whatever is computed from then on depends on which cells are there.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import trio
from numpy.typing import NDArray

from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    CellAttention,
    FreeSequence,
    OpenSequence,
    PruneSequence,
    ResetSequences,
    SequenceOp,
    StepInput,
    StepOutput,
    WatchSequence,
)
from pyagent_node.inference.kv.budgets import WINDOW
from pyagent_node.simulations.backend import PRIME, ToyRunner


class PruningToy(ToyRunner):
    """A runner of the toy whose slots hold ``n_ctx`` cells, and ``n_ctx_train`` positions.

    ``most`` is the greatest number of cells that any slot has held.
    """

    def __init__(
        self,
        part: Slice,
        *,
        whole: bool = False,
        n_ctx: int = 4096,
        n_seq: int = 8,
        seconds: float = 0.0,
        n_ctx_train: int = 0,
    ) -> None:
        super().__init__(part, whole=whole, n_ctx=n_ctx, n_seq=n_seq, seconds=seconds)
        self.info = msgspec.structs.replace(self.info, prunes=True, n_ctx_train=n_ctx_train)
        self.most = 0
        self._gone: dict[int, set[int]] = {}
        self._watched: set[int] = set()

    async def attention(self, seq: int) -> CellAttention:
        """Say of every cell the same."""
        await trio.lowlevel.checkpoint()
        slot = self._slots.get(seq)
        if slot is None or seq not in self._watched:
            raise self._refuse(f"slot {seq} is not watched")
        gone = self._gone[seq]
        positions = np.array([at for at in range(len(slot.history)) if at not in gone], np.int32)
        n, layers = len(positions), self.info.slice.last - self.info.slice.first
        even: NDArray[np.float32] = np.ones(n, np.float32)
        seen = np.ones(n, np.int32)
        return CellAttention(
            positions, np.tile(even, (layers, 1)), even, seen, np.zeros(layers, np.float32), 1
        )

    def _apply(self, op: SequenceOp) -> None:
        if isinstance(op, WatchSequence):
            self._watched.add(op.seq)
        elif isinstance(op, PruneSequence):
            self._prune(op.seq, op.keep)
        else:
            super()._apply(op)
            if isinstance(op, ResetSequences):
                self._gone.clear()
                self._watched.clear()
            elif isinstance(op, OpenSequence | FreeSequence):
                self._gone[op.seq] = set()
                self._watched.discard(op.seq)

    def _prune(self, seq: int, keep: Sequence[tuple[int, int]]) -> None:
        slot, gone = self._slots.get(seq), self._gone[seq]
        kept = {at for start, stop in keep for at in range(start, stop)}
        end = 0 if slot is None else len(slot.history)
        if slot is None or not kept or kept & gone or max(kept) != end - 1:
            raise self._refuse(f"slot {seq} cannot be pruned")
        going = sorted({*range(end)} - kept - gone)
        first = end - WINDOW  # nothing is taken back to before this
        if not going or going[-1] >= first:
            raise self._refuse(f"slot {seq} would lose cells that may be gone back to")
        layers = range(len(slot.states))
        taken = [sum(slot.rows[at][layer] * (at + 1) for at in going) for layer in layers]
        for states in (*slot.before[first:], slot.states):
            states[:] = [(state - row) % PRIME for state, row in zip(states, taken, strict=True)]
        gone.update(going)

    def _chain(self, step: StepInput) -> StepOutput:
        held = step.position - sum(at < step.position for at in self._gone[step.seq])
        self.most = max(self.most, held + len(step.tokens))
        bound = max(self.info.n_ctx, self.info.n_ctx_train)
        if self.most > self.info.n_ctx or step.position + len(step.tokens) > bound:
            raise self._refuse(f"{self.most} cells in a slot of {self.info.n_ctx}")
        return super()._chain(step)
