"""The part of a stage's pure core that gives up cells of sessions that ask for it (``kv.pruning``).

Every rank does so by itself, by what its own layers attend to.  Nothing happens before the last
piece of the prompt: the rows at its end know what is asked.  From there on attention is measured,
and when so many cells are held that it is worth it, the shell is told between two batches; it asks
the runner where the session attended, and carries out what follows from that.

A session whose budget is rolling is measured from its first piece on and pruned behind every piece
of its prompt by the rows at the end of that: no more cells are ever held than the budget and a
piece.  So the shell carries out all that is due before it takes the next batch.

A step may go back behind guesses, but never behind the last ``WINDOW`` cells, which are all kept:
while more guesses than that are unsettled the session is not pruned, and once it was, no step may
go back further (``ServedSession.floor``).
"""

from __future__ import annotations

from collections import deque

import msgspec

from pyagent_node.base.errors import InvalidRequest, Unsupported
from pyagent_node.inference.backend import (
    CellAttention,
    PruneSequence,
    SequenceOp,
    WatchSequence,
)
from pyagent_node.inference.kv.budgets import (
    WINDOW,
    Evicted,
    Pruning,
    budget,
    check,
    due,
    positions,
)
from pyagent_node.inference.kv.pruning import kept, ranges
from pyagent_node.inference.pipeline.frames import OpenSession, Step
from pyagent_node.inference.pipeline.stage_queue import WATCH_EVERY, WATCH_ROWS
from pyagent_node.inference.pipeline.stage_session import ServedSession


class PruneTurn(msgspec.Struct, frozen=True, gc=False):
    """A session whose cells are to be given up now; ``seq`` is its slot."""

    session: ServedSession
    seq: int
    pruning: Pruning


class StagePruning:
    """The sessions of one stage that are pruned; ``able`` says whether its runner can."""

    def __init__(self, *, able: bool, cell_bytes: int, n_ctx: int, trained: int) -> None:
        """Cells of ``cell_bytes``, ``n_ctx`` in a slot, of a model of ``trained`` positions."""
        self.cells = 0
        """Cells that were given up."""
        self.turns = 0
        """Times that cells were given up."""
        self.cell_bytes = cell_bytes
        """What a cell takes in all layers of this rank."""
        self._able = able
        self._n_ctx = n_ctx
        self._trained = trained
        self._due: deque[ServedSession] = deque()

    def check_opening(self, message: OpenSession) -> None:
        """Check how many positions a session asks for, beyond the cells of a slot perhaps.

        Raises :class:`InvalidRequest` (``bad_parameter``) and, where this rank would have to give
        up cells and cannot, :class:`Unsupported` (``no_pruning``).
        """
        pruning, n_ctx = message.pruning, self._n_ctx
        if pruning is not None:
            check(pruning)
        prompt = message.prompt_tokens
        most = positions(pruning, prompt, n_ctx=n_ctx, trained=self._trained)
        if not 1 <= prompt <= message.positions <= most:
            raise InvalidRequest(
                f"A session of {prompt} prompt tokens and {message.positions} positions does not"
                f" fit a context of {most}.",
                code="bad_parameter",
                n_ctx=n_ctx,
            )
        if message.positions > n_ctx and not self._able:
            raise Unsupported(
                f"A session of {message.positions} positions has to give up cells of KV where slots"
                f" have {n_ctx}; this rank cannot.",
                code="no_pruning",
                remedy="Leave kv_budget out, or load the model with a longer context (--context).",
                n_ctx=n_ctx,
            )

    def opened(self, session: ServedSession, pruning: Pruning | None) -> None:
        """Take note of a session that opens."""
        session.pruning = pruning if self._able else None

    def computed(self, session: ServedSession, step: Step) -> None:
        """Note a step of a session."""
        pruning, end = session.pruning, session.end
        if pruning is None or (end <= session.prompt_tokens and not pruning.rolling):
            return
        # ranks before the last keep guesses that turn out wrong: a later step may go back to here
        session.back = step.position + step.known if step.parent is None else step.settled
        if session in self._due or not _settled(session):
            return
        reading = end <= session.prompt_tokens
        if due(pruning, end - session.evicted, end, reading=reading):
            self._due.append(session)

    @property
    def has_turn(self) -> bool:
        """Whether :meth:`next_turn` may return something."""
        return bool(self._due)

    def next_turn(self) -> PruneTurn | None:
        """Take the session whose turn it is; the caller asks where it attended.

        One that has taken up too many guesses while it waited is due again at a later step.
        """
        while self._due:
            session = self._due.popleft()
            pruning, seq = session.pruning, session.seq
            if session.closed or not _settled(session):
                continue
            if pruning is not None and seq is not None:
                return PruneTurn(session, seq, pruning)
        return None

    def plan(self, turn: PruneTurn, found: CellAttention) -> tuple[SequenceOp, ...]:
        """Return what to have the runner do, which is sure to be done; empty for nothing."""
        session, held = turn.session, len(found.positions)
        floor = session.end - WINDOW
        if session.closed or not held or any(q.message.position <= floor for q in session.queue):
            return ()
        most = budget(turn.pruning, session.end)
        keep = kept(found.positions, found.mass.sum(0), found.seen, most=most)
        gone = held - len(keep)
        session.evicted += gone
        if not gone:
            return ()
        session.floor = max(session.floor, floor)
        self.cells += gone
        self.turns += 1
        again = WatchSequence(turn.seq, WATCH_EVERY, WATCH_ROWS)
        return PruneSequence(turn.seq, ranges(keep)), again

    def refused(self, turn: PruneTurn) -> None:
        """Note that the runner does not do it: the session keeps its cells from now on."""
        turn.session.pruning = None

    def failed(self) -> None:
        """Note that the runner failed half-way: sessions that open from now on keep their cells."""
        self._able = False

    def evicted(self, session: ServedSession, before: Evicted | None) -> Evicted | None:
        """Return what ranks up to this one have given up, ``before`` that of the others."""
        if session.pruning is None and not session.evicted:
            return before
        before = before or Evicted()
        return Evicted(
            before.held + session.end - session.evicted,
            before.cells + session.evicted,
            before.bytes + session.evicted * self.cell_bytes,
        )


def _settled(session: ServedSession) -> bool:
    """Whether no later step may go back behind the cells that are always kept."""
    return session.end - session.back < WINDOW
