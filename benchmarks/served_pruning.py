"""Reads a text as a rank reads the prompt of a session whose budget is rolling.

What is given up, and when, is decided by the stage's own core (``pipeline.stage_pruning``).
"""

from __future__ import annotations

from typing import Final, Protocol

from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.inference.backend import CellAttention, SequenceOp, WatchSequence
from pyagent_node.inference.kv.budgets import Pruning
from pyagent_node.inference.pipeline.frames import OpenSession, Step
from pyagent_node.inference.pipeline.stage_pruning import StagePruning
from pyagent_node.inference.pipeline.stage_queue import WATCH_EVERY, WATCH_ROWS
from pyagent_node.inference.pipeline.stage_session import ServedSession
from pyagent_node.inference.sampling import SamplingParams

_SESSION: Final = SessionId("bench")
_MODEL: Final = Digest("0" * 64)


class PrunedBackend(Protocol):
    """What is needed of a backend."""

    def apply(self, op: SequenceOp) -> None:
        """Carry out one sequence operation."""
        ...

    def attention(self, seq: int) -> CellAttention:
        """Return where a watched sequence attended."""
        ...


class ServedPrompt:
    """A prompt of ``tokens`` tokens in slot ``seq``, which is open."""

    def __init__(
        self, backend: PrunedBackend, seq: int, cells: int, tokens: int, *, n_ctx: int
    ) -> None:
        pruning = Pruning(cells, rolling=True)
        opening = OpenSession(
            _SESSION, _MODEL, 1, 0, PeerId(""), n_ctx, tokens, SamplingParams(), pruning=pruning
        )
        self.rows = 0
        """Rows whose attention was measured."""
        self.most = 0
        """The most cells that were held."""
        self._backend = backend
        self._seq = seq
        self._core = StagePruning(able=True, cell_bytes=0, n_ctx=n_ctx, trained=n_ctx)
        self._session = ServedSession(opening, 0.0)
        self._session.seq = seq
        self._core.opened(self._session, pruning)
        self._steps = 0

    def watch(self) -> None:
        """Measure what comes next."""
        self._backend.apply(WatchSequence(self._seq, WATCH_EVERY, WATCH_ROWS))

    def read(self, start: int, stop: int) -> None:
        """Note that a piece was computed; give up what is due."""
        core, session = self._core, self._session
        session.end = stop
        n = stop - start
        core.computed(session, Step(_SESSION, _MODEL, 1, 0, self._steps, start, n, sample=False))
        self._steps += 1
        self.most = max(self.most, stop - session.evicted)
        while (turn := core.next_turn()) is not None:
            found = self._backend.attention(self._seq)
            self.rows += found.rows
            for op in core.plan(turn, found):
                self._backend.apply(op)
