"""Who gets a slot and what is computed next: the scheduling half of a stage's pure core.

Sessions wait for a slot in order of arrival.  Single tokens of different sessions are computed
together, and so are steps with guesses where the runner found shapes in which that changes no bit
(elsewhere it gains nothing).  The two kinds do not mix, so that nobody's single token waits for the
guesses of others in its own batch, unless many wait: then large batches are better for all of them,
and short steps go together whatever they hold.  A prefill chunk is computed alone, for it takes
many times as long.  Prefill and the rest take turns.  (What a session gets does not depend on its
company: see the ``Backend`` port, which is also why the lowest slot goes first, and why only
neighbouring slots keep each other company.)

Among those that are ready the session goes first that will have been given the fewest rows by the
end of its step, as in weighted fair queueing; one that was idle begins with those that are served
now.  So a session that sends all the guesses it may gets as many rows as any other, not as many
steps, and it is its own wide steps that wait while others do: whoever measures what a pass takes by
its width (see ``drafting``) learns how busy the ranks are.

A step that is void (see ``frames``) is dropped when its turn to become ready comes.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Final, NamedTuple

from pyagent_node.inference.backend import (
    MAX_DECODE_ROWS,
    FreeSequence,
    KvRange,
    OpenSequence,
    SequenceOp,
    StepInput,
    Tokens,
    TrimSequence,
    WatchSequence,
)
from pyagent_node.inference.kv.ranges import lacking
from pyagent_node.inference.pipeline.frames import Step
from pyagent_node.inference.pipeline.stage_session import QueuedStep, ServedSession

CROWD: Final = 8
"""When so many steps wait, short ones are computed together whether they hold guesses or not."""
WATCH_EVERY: Final = 8
"""Tokens of an answer from one whose attention is measured to the next, in pruned sessions."""
WATCH_ROWS: Final = 32
"""Rows at the end of a prompt that are measured (SnapKV's window is 16 to 64)."""


class Taken(NamedTuple):
    """Cells of a piece that go into slot ``seq`` before a step."""

    seq: int
    kv: KvRange
    tokens: Tokens


class Batch(NamedTuple):
    """Work for the runner: sequence operations, then ``cells``, then one decode of ``inputs``."""

    ops: tuple[SequenceOp, ...]
    inputs: tuple[StepInput, ...]
    work: tuple[tuple[ServedSession, QueuedStep], ...]
    cells: tuple[Taken, ...] = ()

    def only(self, seq: int) -> Batch:
        """Return the step of one slot alone, without operations and cells."""
        both = [pair for pair in zip(self.inputs, self.work, strict=True) if pair[0].seq == seq]
        return Batch((), tuple(step for step, _ in both), tuple(work for _, work in both))

    def without(self, seq: int) -> Batch:
        """Return the steps of the other slots, with the cells before them, without operations."""
        both = [pair for pair in zip(self.inputs, self.work, strict=True) if pair[0].seq != seq]
        cells = tuple(x for x in self.cells if x.seq != seq)
        return Batch((), tuple(step for step, _ in both), tuple(work for _, work in both), cells)

    def apart(self) -> list[Batch]:
        """Return its steps one by one, without the operations, each with the cells before it."""
        pairs = zip(self.inputs, self.work, strict=True)
        return [
            Batch((), (step,), (work,), tuple(x for x in self.cells if x.seq == step.seq))
            for step, work in pairs
        ]


class StageQueue:
    """Slots, waiting steps and turns of one stage.

    ``sampling`` says whether the runner has the output head: only then it is told sampling
    parameters and asked for tokens.  Up to ``width`` single tokens are computed together, and so
    many rows of steps with guesses as ``guess_rows`` says, 0 for one step at a time.
    """

    def __init__(self, *, slots: int, width: int, sampling: bool, guess_rows: int = 0) -> None:
        self.steps = 0
        self.bytes = 0
        self.dropped = 0
        """Void steps that were not computed."""
        self._width = width
        self._guess_rows = guess_rows
        self._served = 0
        self._sampling = sampling
        self._slots: list[int] = list(range(slots))
        self._waiting: deque[ServedSession] = deque()
        self._ops: list[SequenceOp] = []
        self._tokens: deque[ServedSession] = deque()
        self._chunks: deque[ServedSession] = deque()
        self._chunk_turn = False

    @property
    def waiting(self) -> int:
        """Sessions without a slot."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether :meth:`take` would return something."""
        return bool(self._ops or self._tokens or self._chunks)

    def admit(self, session: ServedSession) -> None:
        """Give ``session`` a slot, now or when its turn comes."""
        self._waiting.append(session)
        self._grant()

    def push(self, session: ServedSession, step: QueuedStep) -> None:
        """Add the next step of ``session``."""
        session.queue.append(step)
        self.steps += 1
        self.bytes += step.size
        if len(session.queue) == 1:
            self._make_ready(session)

    def finished(self, session: ServedSession, step: Step, sampled: int) -> None:
        """Note that a step of ``session`` was computed and ``sampled`` tokens came of it."""
        session.in_flight = False
        session.served = session.due + _rows(step, sampled)
        if session.queue:
            self._make_ready(session)

    def cancel(self, session: ServedSession, first: int, stop: int) -> None:
        """Drop the steps ``[first, stop)`` that have parents, when their turn comes."""
        session.cancelled = (first, stop)
        for ready in (self._tokens, self._chunks):
            if session in ready:
                ready.remove(session)
                self._make_ready(session)
                return

    def remove(self, session: ServedSession) -> None:
        """Drop a session's queued steps and free its slot.

        Even a slot that is being computed on is given away at once: the runner takes operations
        between decodes, so it is freed and opened again before its next use.
        """
        self.park(session)
        self.free(session)

    def free(self, session: ServedSession) -> None:
        """Free the slot of a session that was parked, if it has one."""
        if session.seq is None:
            return
        self._ops.append(FreeSequence(session.seq))
        heapq.heappush(self._slots, session.seq)
        self._grant()

    def park(self, session: ServedSession) -> None:
        """Drop a session's queued steps; it keeps its slot."""
        session.closed = True
        self.steps -= len(session.queue)
        self.bytes -= sum(step.size for step in session.queue)
        session.queue.clear()
        if session.seq is None:
            self._waiting.remove(session)
            return
        for ready in (self._tokens, self._chunks):
            if session in ready:
                ready.remove(session)

    def take_ops(self) -> tuple[SequenceOp, ...]:
        """Take the sequence operations alone."""
        ops = (*self._ops,)
        self._ops.clear()
        return ops

    def empty(self, session: ServedSession) -> None:
        """Drop all cells of a session; its slot stays its own."""
        self._ops += self._emptied(session)

    def _emptied(self, session: ServedSession) -> list[SequenceOp]:
        seq = _slot(session)
        sampling = session.sampling if self._sampling else None
        return [FreeSequence(seq), OpenSequence(seq, sampling)]

    def clear_ops(self) -> None:
        """Forget the pending sequence operations: there is no runner to carry them out."""
        self._ops.clear()

    def take(self) -> Batch | None:
        """Take the work that is due now."""
        work: list[tuple[ServedSession, QueuedStep]] = []
        trims: list[SequenceOp] = []
        cells: list[Taken] = []
        if self._chunks and (self._chunk_turn or not self._tokens):
            self._chunk_turn = False
            chosen = [self._chunks.popleft()]
        else:
            chosen = self._company()
            self._chunk_turn = self._chunk_turn or bool(chosen)
        for session in chosen:
            session.in_flight = True
            step = self._next(session)
            position = step.message.position
            if position < session.end:
                trims += (
                    self._emptied(session)
                    if position == 0
                    else [TrimSequence(_slot(session), position)]
                )
            watched = session.pruning is not None and (
                session.pruning.rolling or step.message.stop >= session.prompt_tokens
            )
            if watched and not session.watched:
                session.watched = True
                trims.append(WatchSequence(_slot(session), WATCH_EVERY, WATCH_ROWS))
            marks, behind = session.marks, position >= session.prompt_tokens
            if marks is not None and behind and not session.watched:
                session.watched = True
                trims.append(WatchSequence(_slot(session), 1, marks.probe))
            gap = session.gaps.pop(session.end, None) if position > session.end else None
            if gap is not None:  # it was checked that there is one; else the runner says no
                cells.append(Taken(_slot(session), *gap))
                session.evicted += lacking(gap[0])
            session.end = step.message.stop
            for start in [at for at in session.gaps if at < session.end]:
                del session.gaps[start]  # another rank lacks it, so it is computed
            work.append((session, step))
        if not work and not self._ops:
            return None
        ops = (*self._ops, *trims)
        self._ops.clear()
        inputs = tuple(
            StepInput(
                _slot(s),
                q.message.position,
                q.tokens,
                q.activations,
                q.message.sample and self._sampling,
                q.message.drafts,
                q.message.parents,
            )
            for s, q in work
        )
        return Batch(ops, inputs, tuple(work), tuple(cells))

    def _company(self) -> list[ServedSession]:
        """Take the session that is due first and those that are computed with it."""
        ready = self._tokens
        if not ready:
            return []
        first = min(ready, key=_finish)
        self._served = max(self._served, first.due)
        chosen = [first]
        message = first.queue[0].message
        single = message.n == 1
        mixed = self._guess_rows > 0 and len(ready) >= CROWD and message.n <= MAX_DECODE_ROWS
        room = (self._width if single and not mixed else self._guess_rows) - message.n
        if room > 0 and len(ready) > 1 and not message.parents:
            alike = {
                _slot(session): session
                for session in ready
                if (other := session.queue[0].message).n <= room
                and (other.n <= MAX_DECODE_ROWS if mixed else (other.n == 1) == single)
                and not other.parents
            }
            low = high = _slot(first)
            while beside := [alike[at] for at in (low - 1, high + 1) if at in alike]:
                session = min(beside, key=_finish)
                room -= session.queue[0].message.n
                if room < 0:
                    break
                chosen.append(session)
                low, high = min(low, _slot(session)), max(high, _slot(session))
        for session in chosen:
            ready.remove(session)
        return chosen

    def _make_ready(self, session: ServedSession) -> None:
        if session.seq is None or session.in_flight:
            return
        queue = session.queue
        message = queue[0].message
        while message.parent is not None and session.is_void(
            message, int(queue[0].tokens[0]), tail=self._sampling
        ):
            session.void = self._next(session).message.step
            self.dropped += 1
            if not queue:
                return
            message = queue[0].message
        session.due = max(session.served, self._served)
        chunk = message.n > 1 and not message.drafts
        (self._chunks if chunk else self._tokens).append(session)

    def _next(self, session: ServedSession) -> QueuedStep:
        step = session.queue.popleft()
        self.steps -= 1
        self.bytes -= step.size
        return step

    def _grant(self) -> None:
        while self._slots and self._waiting:
            session = self._waiting.popleft()
            session.seq = heapq.heappop(self._slots)
            self._ops.append(
                OpenSequence(session.seq, session.sampling if self._sampling else None)
            )
            if session.queue:
                self._make_ready(session)


def _rows(step: Step, sampled: int) -> int:
    """Return what a step counts in its session's share of the rows.

    Prefill counts nothing there, for it has turns of its own.  The last rank computes no more of a
    step once a guess has turned out wrong.
    """
    if step.n > 1 and not step.drafts:
        return 0
    if not sampled:
        return step.n
    blocks = -(-(step.known + sampled - 1) // MAX_DECODE_ROWS)
    return min(step.n, blocks * MAX_DECODE_ROWS)


def _finish(session: ServedSession) -> int:
    return session.due + session.queue[0].message.n


def _slot(session: ServedSession) -> int:
    assert session.seq is not None, "only sessions with a slot become ready"
    return session.seq
