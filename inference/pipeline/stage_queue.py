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
from collections.abc import Sequence
from typing import Final, NamedTuple

from pyagent_node.inference.backend import (
    MAX_DECODE_ROWS,
    Activations,
    FreeSequence,
    KvRange,
    OpenSequence,
    SequenceOp,
    StepInput,
    Tokens,
    TrimSequence,
    WatchSequence,
)
from pyagent_node.inference.kv.budgets import Pruning
from pyagent_node.inference.pipeline.frames import OpenSession, Step
from pyagent_node.inference.pipeline.session_blocks import SessionBlocks
from pyagent_node.inference.sampling import Sampled, SamplingParams

CROWD: Final = 8
"""When so many steps wait, short ones are computed together whether they hold guesses or not."""
WATCH_EVERY: Final = 8
"""Tokens of an answer from one whose attention is measured to the next, in pruned sessions."""
WATCH_ROWS: Final = 32
"""Rows at the end of a prompt that are measured (SnapKV's window is 16 to 64)."""


class QueuedStep(NamedTuple):
    """A step that waits; ``size`` counts the bytes of its tail."""

    message: Step
    tokens: Tokens
    activations: Activations | None
    size: int


class ServedSession:
    """One session on this stage; ``seq`` is its slot, ``None`` while it waits for one.

    ``next_step`` and ``next_position`` follow on the last step that came in.  ``end`` is where the
    cells end after what was given to the runner, ``sure`` where they will end at least, whatever
    queued guesses turn out to be.  ``verdict`` is the last step that sampled and its last token, -1
    if one of its guesses was wrong; ``void`` the last step that was dropped; ``cancelled`` the
    steps from which to which the head cancelled.  ``served`` counts its rows on the queue's scale,
    ``due`` is what that came to when its next step became ready.  ``blocks`` is ``None`` where no
    KV is kept or reused; ``restores`` says whether its head has asked for blocks, or pieces.
    ``cut`` is the greatest ``prefill_cut`` of the ranks up to this one, ``gaps`` has the cells
    that can be taken over, by where they begin, and their tokens; ``keeps`` says that the head is
    to be told when its blocks are kept.  ``pruning`` says how many cells it may hold, ``None`` for
    all of them; ``evicted`` cells were given up, and ``watched`` says that its attention is
    measured.  Later steps may go back to ``back``, and must not to ``floor`` or before, where cells
    are gone.  ``classes`` are the exactness classes of the ranks up to this one, and ``trail`` are
    those ranks, until the last one has told the head of them.
    """

    __slots__ = (
        "back",
        "blocks",
        "cancelled",
        "classes",
        "closed",
        "cut",
        "due",
        "end",
        "epoch",
        "evicted",
        "first_sample",
        "floor",
        "gaps",
        "generated",
        "head",
        "id",
        "in_flight",
        "keeps",
        "last_seen",
        "next_position",
        "next_step",
        "positions",
        "prompt_tokens",
        "pruning",
        "queue",
        "restores",
        "sampling",
        "seq",
        "served",
        "settled",
        "sure",
        "sure_step",
        "trail",
        "verdict",
        "void",
        "watched",
    )

    def __init__(self, message: OpenSession, now: float) -> None:
        self.id = message.session
        self.epoch = message.epoch
        self.head = message.head
        self.positions = message.positions
        self.prompt_tokens = message.prompt_tokens
        self.sampling: SamplingParams = message.sampling
        self.seq: int | None = None
        self.queue: deque[QueuedStep] = deque()
        self.in_flight = False
        self.closed = False
        self.next_position = 0
        self.next_step = 0
        self.end = 0
        self.sure = 0
        self.sure_step = 0
        self.settled = 0
        self.verdict: tuple[int, int] = (-1, -1)
        self.void = -1
        self.cancelled: tuple[int, int] = (0, 0)
        self.served = 0
        self.due = 0
        self.generated = 0
        self.first_sample: float | None = None
        self.last_seen = now
        self.blocks: SessionBlocks | None = None
        self.restores = False
        self.cut = message.cut
        self.classes = message.classes
        self.trail = message.trail
        self.gaps: dict[int, tuple[KvRange, Tokens]] = {}
        self.keeps = False
        self.pruning: Pruning | None = None
        self.evicted = 0
        self.back = 0
        self.floor = -1
        self.watched = False

    def came(self, step: Step, *, keeps: bool) -> None:
        """Note a step that came in; the runner ``keeps`` guesses on every rank but the last."""
        self.next_step = step.step + 1
        self.next_position = step.stop
        if step.parent is None:
            self.sure = step.stop if keeps else step.position + step.known
            self.sure_step = step.step

    def computed(self, queued: QueuedStep, sampled: Sequence[Sampled]) -> None:
        """Note what a step has come to; ``sampled`` is empty on every rank but the last."""
        step = queued.message
        if sampled:
            right = len(sampled) - 1
            self.end = step.position + step.known + right
            holds = self.end == step.stop and _straight(queued, sampled)
            self.verdict = (step.step, sampled[-1].token if holds else -1)
        if step.step >= self.sure_step:
            self.sure = self.end
        if step.sample:
            known = step.position + step.known
            self.generated = self.generated + known - self.settled if self.generated else 1
            self.settled = known

    def is_void(self, step: Step, first: int, *, tail: bool) -> bool:
        """Whether a step with ``first`` for its first token need not be computed any more."""
        parent = step.parent
        if parent is None:
            return False
        if parent == self.void or self.cancelled[0] <= step.step < self.cancelled[1]:
            return True
        return tail and self.verdict != (parent, first)


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
        """Return the steps of the other slots, without operations and cells."""
        both = [pair for pair in zip(self.inputs, self.work, strict=True) if pair[0].seq != seq]
        return Batch((), tuple(step for step, _ in both), tuple(work for _, work in both))

    def apart(self) -> list[Batch]:
        """Return its steps one by one, without the operations."""
        pairs = zip(self.inputs, self.work, strict=True)
        return [Batch((), (step,), (work,)) for step, work in pairs]


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
            watched = session.pruning is not None and step.message.stop >= session.prompt_tokens
            if watched and not session.watched:
                session.watched = True
                trims.append(WatchSequence(_slot(session), WATCH_EVERY, WATCH_ROWS))
            gap = session.gaps.pop(session.end, None) if position > session.end else None
            if gap is not None:  # it was checked that there is one; else the runner says no
                cells.append(Taken(_slot(session), *gap))
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


def _straight(queued: QueuedStep, sampled: Sequence[Sampled]) -> bool:
    """Whether the sampled tokens but the last are the first guesses of the step."""
    known = queued.message.known
    right: list[int] = queued.tokens[known : known + len(sampled) - 1].tolist()
    return right == [one.token for one in sampled[:-1]]


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
